"""Merging: the same logits, undone to the bit, refused where rounding hurts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from postil.adapter import LoraConfig, attach, detach
from postil.adapter import merge as merging
from postil.adapter.export import export_merged
from postil.adapter.merge import merge, unmerge
from postil.base import live_digest
from postil.base.fingerprint import live_source
from postil.errors import AdapterError


def test_merged_logits_are_the_adapted_ones_and_unmerging_restores_the_objects(
    mergeable: tuple[str, LoraConfig], lab: Any
) -> None:
    name, config = mergeable
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
    before, calls, real = live_digest(base), [], merging.logits_of

    def failing(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(merging, "logits_of", failing)
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
