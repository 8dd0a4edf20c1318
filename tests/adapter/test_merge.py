"""Merging: the same logits, undone to the bit, refused where rounding hurts, and exported as a plain model."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from postil.adapter import Adapter, LoraConfig, attach, detach
from postil.adapter import merge as merging
from postil.adapter.merge import export_merged, merge, unmerge
from postil.base import live_digest
from postil.base.fingerprint import live_source
from postil.errors import AdapterError, StorageError

KINDS: dict[str, tuple[str, LoraConfig]] = {
    "linear": ("llama", LoraConfig(target_modules="all-linear")),
    "rslora": ("qwen2", LoraConfig(r=4, use_rslora=True)),
    "conv1d": ("gpt2", LoraConfig(target_modules="all-linear")),
    "embedding": ("llama", LoraConfig(target_modules=("embed_tokens", "q_proj"))),
    "scaled embedding": ("gemma3", LoraConfig(target_modules=("embed_tokens", "q_proj"))),
    "tied head": ("gemma2", LoraConfig(target_modules=("lm_head", "q_proj"))),
    "tied both": ("gemma2", LoraConfig(target_modules=("lm_head", "embed_tokens"))),
    "biases": ("gpt2", LoraConfig(bias="all")),
    "adapted biases": ("qwen2", LoraConfig(bias="lora_only")),
    "saved whole": ("llama", LoraConfig(modules_to_save=("lm_head", "norm"))),
    "saved tied head": ("gpt2", LoraConfig(modules_to_save=("lm_head",))),
}


def loaded(directory: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_logits_are_the_adapted_ones_and_unmerging_restores_the_objects(kind: str, lab: Any) -> None:
    name, config = KINDS[kind]
    base = lab.tiny(name)
    before = live_digest(base)
    objects = dict(base.named_parameters(remove_duplicate=False))
    model = attach(base, config)
    lab.scramble(model)
    wanted = lab.plain(model, lab.ids)
    drift = merge(model, "default")
    assert drift.max_logit < 1e-4
    assert drift.mean_logit <= drift.max_logit
    assert drift.tokens == merging.PROBE_TOKENS
    assert live_digest(base) != before
    assert not any(parameter.requires_grad for parameter in base.parameters())
    torch.testing.assert_close(lab.plain(model, lab.ids), wanted, rtol=0, atol=1e-4)
    unmerge(model)
    after = dict(base.named_parameters(remove_duplicate=False))
    assert all(after[key] is parameter for key, parameter in objects.items())
    assert model.active == {"default": 1.0}
    assert torch.equal(lab.plain(model, lab.ids), wanted)
    detach(model)
    assert live_digest(base) == before


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_loads_in_plain_transformers(kind: str, lab: Any, tmp_path: Path) -> None:
    name, config = KINDS[kind]
    base = lab.tiny(name)
    tied = base.config.tie_word_embeddings
    model = attach(base, config)
    lab.scramble(model)
    before = live_digest(base)
    directory = export_merged(model, "default", tmp_path / "whole").path
    plain = loaded(directory)
    torch.testing.assert_close(lab.plain(plain, lab.ids), lab.plain(model, lab.ids), rtol=0, atol=1e-4)
    assert live_digest(base) == before
    assert base.config.tie_word_embeddings == tied
    heads = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert heads == (tied and kind not in ("tied head", "tied both", "scaled embedding", "saved tied head"))
    assert {stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()} == {0o644}


def test_a_weighted_combination_merges(lab: Any) -> None:
    model = attach(lab.tiny(), LoraConfig(), name="a")
    attach(model, LoraConfig(target_modules=("q_proj", "up_proj"), r=2), name="b")
    lab.scramble(model, "a", seed=1)
    lab.scramble(model, "b", seed=2)
    model.activate(a=0.5, b=-1.5)
    wanted = lab.plain(model, lab.ids)
    model.activate("a")
    merge(model, {"a": 0.5, "b": -1.5})
    torch.testing.assert_close(lab.plain(model, lab.ids), wanted, rtol=0, atol=1e-4)
    unmerge(model)
    assert model.active == {"a": 1.0}


def test_a_drift_above_the_bound_is_undone(lab: Any) -> None:
    base = lab.tiny().to(torch.bfloat16)
    before = live_digest(base)
    model = attach(base, LoraConfig(target_modules="all-linear"))
    lab.scramble(model)
    drift = merge(model, "default")
    assert 0 < drift.max_logit < merging.BOUNDS[torch.bfloat16]
    unmerge(model)
    with pytest.raises(
        AdapterError, match=r"moves a logit by 0\.\d+ \(mean .*, on 12 tokens\), above the bound of 1e-06"
    ):
        merge(model, "default", bound=1e-6, probe_ids=lab.ids)
    assert not model.merged
    assert model.active == {"default": 1.0}
    detach(model)
    assert live_digest(base) == before


def test_a_drift_that_is_not_a_number_is_refused(lab: Any) -> None:
    model = attach(lab.tiny(), LoraConfig())
    next(iter(model.resident("default").leaves.values())).fill_(float("nan"))
    with pytest.raises(AdapterError, match="nan"):
        merge(model, "default")
    assert not model.merged


def test_an_error_in_the_middle_of_merging_is_undone(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base = lab.tiny()
    model = attach(base, LoraConfig())
    lab.scramble(model)
    before, calls, real = live_digest(base), [], merging._logits

    def failing(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(merging, "_logits", failing)
    with pytest.raises(MemoryError):
        merge(model, "default")
    assert (live_digest(base), model.active, model.merged) == (before, {"default": 1.0}, {})


def test_while_merged_nothing_that_needs_the_bare_base_runs(lab: Any, tmp_path: Path) -> None:
    model = attach(lab.tiny(), LoraConfig())
    with pytest.raises(AdapterError, match="nothing to unmerge"):
        unmerge(model)
    merge(model, "default")
    for action in (
        lambda: merge(model, "default"),
        lambda: model.activate("default"),
        lambda: detach(model),
        lambda: model.add("other", LoraConfig()),
        lambda: export_merged(model, "default", tmp_path / "x"),
        lambda: model.disabled().__enter__(),
    ):
        with pytest.raises(AdapterError, match="unmerge it"):
            action()
    model.activate()
    unmerge(model)
    detach(model)


def test_what_is_exported_while_merged_still_belongs_to_the_base(lab: Any) -> None:
    base = lab.tiny()
    model = attach(base, LoraConfig())
    lab.scramble(model)
    merge(model, "default")
    adapter = model.export("default")
    unmerge(model)
    assert adapter.base == attach(detach(model), LoraConfig()).export("default").base
    assert adapter.base["source"] == live_source(base)


def test_an_export_tells_its_drift_and_is_refused_above_the_bound(lab: Any, tmp_path: Path) -> None:
    base = lab.tiny().to(torch.bfloat16)
    before = live_digest(base)
    model = attach(base, LoraConfig(target_modules="all-linear"))
    lab.scramble(model)
    with pytest.raises(
        AdapterError, match=r"exporting default moves a logit by 0\.\d+ \(mean .* nothing was written"
    ):
        export_merged(model, "default", tmp_path / "whole", bound=1e-6)
    assert not (tmp_path / "whole").exists()
    assert (live_digest(base), model.active, model.merged) == (before, {"default": 1.0}, {})
    drift = export_merged(model, "default", tmp_path / "whole").drift
    assert drift == merge(model, "default")
    unmerge(model)
    assert live_digest(base) == before
    adapter = model.export("default")
    adapter.base = {}
    drift = export_merged(lab.tiny(), adapter, tmp_path / "half", dtype=torch.bfloat16).drift
    assert 1e-3 < drift.max_logit < 2  # all weights are rounded, and measured


def test_an_export_that_broke_is_refused(lab: Any, tmp_path: Path) -> None:
    model = attach(lab.tiny(), LoraConfig())
    next(iter(model.resident("default").leaves.values())).fill_(float("nan"))
    with pytest.raises(AdapterError, match="nan"):
        export_merged(model, "default", tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_an_export_replaces_nothing(lab: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("keep me")
    model = attach(lab.tiny(), LoraConfig())
    with pytest.raises(StorageError, match="a directory with files in it already"):
        export_merged(model, "default", tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert export_merged(model, "default", tmp_path / "empty").path == tmp_path / "empty"


def test_names_and_weights_are_checked(lab: Any, tmp_path: Path) -> None:
    model = attach(lab.tiny(), LoraConfig(modules_to_save=("lm_head",)), name="french")
    attach(model, LoraConfig(), name="german")
    with pytest.raises(AdapterError, match="did you mean 'french'"):
        merge(model, "frensh")
    with pytest.raises(AdapterError, match="not all 0"):
        merge(model, {"german": 0.0})
    with pytest.raises(AdapterError, match="cannot be combined"):
        merge(model, {"french": 1.0, "german": 1.0})
    with pytest.raises(AdapterError, match="give an Adapter"):
        export_merged(lab.tiny(), "french", tmp_path / "x")


def test_an_adapter_on_a_base_exports_and_leaves_the_base_alone(lab: Any, tmp_path: Path) -> None:
    model = attach(lab.tiny(), LoraConfig())
    lab.scramble(model)
    wanted, adapter = lab.plain(model, lab.ids), model.export("default")
    assert isinstance(adapter, Adapter)
    detach(model)
    before = live_digest(model.model)
    one = export_merged(model.base, adapter, tmp_path / "one").path
    two = export_merged(attach(model.base), adapter, tmp_path / "two").path
    assert live_digest(model.model) == before
    for directory in (one, two):
        torch.testing.assert_close(lab.plain(loaded(directory), lab.ids), wanted, rtol=0, atol=1e-4)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_an_export_in_another_dtype(lab: Any, tmp_path: Path) -> None:
    base = lab.tiny("gpt2")
    model = attach(base, LoraConfig())
    lab.scramble(model)
    directory = export_merged(model, "default", tmp_path / "half", dtype=torch.bfloat16).path
    plain = loaded(directory)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    torch.testing.assert_close(lab.plain(plain, lab.ids).float(), lab.plain(model, lab.ids), rtol=0, atol=0.2)
    assert base.config.dtype == torch.float32


@pytest.mark.parametrize("untying", [False, True])
def test_a_full_disk_leaves_nothing(untying: bool, lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(target_modules=("lm_head",)) if untying else LoraConfig()
    base = lab.tiny("gpt2")
    model = attach(base, config)
    before = live_digest(base)

    def full(directory: Path, **_: Any) -> None:
        (Path(directory) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(base, "save_pretrained", full)
    with pytest.raises(StorageError, match="whole could not be written"):
        export_merged(model, "default", tmp_path / "whole")
    assert [path for path in tmp_path.iterdir() if path.name != "home"] == []
    assert base.config.tie_word_embeddings
    assert live_digest(base) == before
