"""Exporting: a plain model directory with the adapted logits, refused where rounding hurts, nothing replaced."""

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
from postil.adapter.export import _cast, export_merged
from postil.adapter.merge import merge, unmerge
from postil.base import live_digest
from postil.errors import AdapterError, StorageError


def loaded(directory: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def test_an_export_loads_in_plain_transformers(mergeable: tuple[str, LoraConfig], lab: Any, tmp_path: Path) -> None:
    name, config = mergeable
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
    touched = {"lm_head", "embed_tokens"} & {*(config.target_modules or ()), *(config.modules_to_save or ())}
    assert heads == (tied and not touched)
    assert {stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()} == {0o644}


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


def test_a_cast_takes_no_tensor_for_another_that_begins_where_it_does() -> None:
    whole = torch.arange(6.0)
    state = {
        "whole": whole, "tied": whole, "turned": whole.view(2, 3).T, "square": whole[:4].view(2, 2),
        "first": whole[:1], "empty": torch.empty(0, 3), "other empty": torch.empty(2, 0), "codes": torch.arange(3),
        "half": torch.zeros(3, dtype=torch.bfloat16),
    }  # fmt: skip
    cast = _cast(state, torch.bfloat16)
    for key, value in state.items():
        assert cast[key].shape == value.shape
        assert torch.equal(cast[key], value.to(torch.bfloat16) if value.is_floating_point() else value)
    assert cast["tied"] is cast["whole"]
    assert cast["codes"].dtype == torch.int64
