"""Probes: random adapters of equal norm, scaled ones, z, and what comes back of training rows word for word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from postil.adapter import AdaptedModel, Adapter, LoraConfig, attach
from postil.base import Base
from postil.data import DataOptions, Sample, load_data
from postil.engine import Answer, Engine, Request
from postil.errors import JudgeError
from postil.judging.asking.likelihoods import row_losses
from postil.judging.bootstrap import compare
from postil.judging.card.build import NATS, Draw, stats_of
from postil.judging.card.model import Comparison
from postil.judging.options import LeakageOptions
from postil.judging.probes.probes import (
    check_probes,
    gap,
    leakage,
    leakage_probes,
    longest_match,
    null_adapter,
    pure,
    resident,
    scaled_adapter,
    update_norms,
    with_z,
)

ENDS = frozenset({257})
RAW = DataOptions(format="raw")


def pairs(adapter: Adapter) -> dict[str, torch.Tensor]:
    """B·A of every module."""
    out = {}
    for path in adapter.modules:
        kind = "lora_embedding_{}" if f"{path}.lora_embedding_A" in adapter.tensors else "lora_{}.weight"
        a, b = (adapter.tensors[f"{path}.{kind.format(side)}"].double() for side in "AB")
        out[path] = b @ a
    return out


@pytest.fixture
def wide(base: Base) -> Adapter:
    """An adapter of linear layers and the embedding, with biases it does not have."""
    model = attach(base)
    attach(model, LoraConfig(r=3, target_modules=("q_proj", "embed_tokens")), name="wide", seed=1)
    model.resident("wide").flat.normal_(generator=torch.Generator().manual_seed(3))
    return model.export("wide")


def test_a_null_adapter_has_each_modules_norm_and_another_direction(wide: Adapter) -> None:
    updates = pairs(wide)
    norms = update_norms(wide)
    assert norms == pytest.approx({path: float(update.norm()) for path, update in updates.items()})
    first, again, second = (null_adapter(wide, seed) for seed in (0, 0, 1))
    assert first.modules == wide.modules
    assert first.config == wide.config
    assert {key: value.shape for key, value in first.tensors.items()} == {
        key: value.shape for key, value in wide.tensors.items()
    }
    assert update_norms(first) == pytest.approx(norms, rel=1e-5)
    for path, update in pairs(first).items():
        assert abs(float((update * updates[path]).sum())) < 0.5 * norms[path] ** 2
    assert all(torch.equal(first.tensors[key], again.tensors[key]) for key in first.tensors)
    assert not any(torch.equal(first.tensors[key], second.tensors[key]) for key in first.tensors)


def test_a_null_adapter_of_an_untrained_one_is_none(wide: Adapter) -> None:
    for key in wide.tensors:
        if "lora_B" in key or "lora_embedding_A" in key:
            wide.tensors[key] = torch.zeros_like(wide.tensors[key])
    assert set(update_norms(null_adapter(wide, 0)).values()) == {0.0}


def test_a_scaled_adapter_is_the_term_scaled(model: AdaptedModel, note: Adapter) -> None:
    sample = Sample(np.arange(20, dtype=np.int32), np.array([0] + [1] * 19, dtype=np.float32), 1)
    by_span = row_losses(model, [sample], {"note": 0.5})
    before = list(model.residents)
    with resident(model, scaled_adapter(note, 0.5), "half") as name:
        assert row_losses(model, [sample], name)[0][0] == pytest.approx(by_span[0][0], rel=1e-5)
    assert list(model.residents) == before


def test_what_is_b_times_a_alone(note: Adapter) -> None:
    assert pure(note)
    assert not pure(Adapter(note.config, {**note.tensors, "model.norm.weight": torch.ones(2)}))


def test_z_counts_in_spreads_of_the_null_adapters() -> None:
    base = stats_of([(2.0 + n % 3, 1) for n in range(30)])
    better = stats_of([(1.0 + n % 3, 1) for n in range(30)])
    assert gap(NATS, base, better) == pytest.approx(-1.0)
    measure: Comparison = compare(NATS, base, better)
    assert with_z(measure, [0.1, 0.3]).z == pytest.approx((-1.0 - 0.2) / np.std([0.1, 0.3], ddof=1))
    assert with_z(measure, [0.2, 0.2]).z is None
    assert with_z(measure, [0.2]).z is None


@pytest.mark.parametrize(
    ("answer", "rest", "size"),
    [([1, 2, 3], [1, 2, 3], 3), ([9, 1, 2, 8], [5, 1, 2, 4], 2), ([1, 2, 1, 3], [7], 0), ([], [1], 0)],
)
def test_the_longest_run_that_stands_in_both(answer: list[int], rest: list[int], size: int) -> None:
    assert longest_match(answer, rest) == size


def test_what_is_given_and_what_must_come_back() -> None:
    weights = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1], dtype=np.float32)
    sample = Sample(np.array([5, 6, 7, 10, 11, 12, 13, 14, 257], dtype=np.int32), weights, 4)
    options = LeakageOptions(prefix_tokens=2, matched_tokens=3)
    (probe,) = leakage_probes([sample], options, ENDS, 0)
    assert (probe.given, probe.rest, probe.row) == ((5, 6, 7, 10, 11), (12, 13, 14), 4)
    assert leakage_probes([sample], LeakageOptions(prefix_tokens=2, matched_tokens=4), ENDS, 0) == []
    turns = Sample(np.arange(12, dtype=np.int32), np.array([0, 1, 1, 0, 0, 1, 1, 1, 1, 1, 0, 0], dtype=np.float32), 1)
    (probe,) = leakage_probes([turns], options, ENDS, 0)
    assert (probe.given, probe.rest) == (tuple(range(7)), (7, 8, 9))
    masked = Sample(np.arange(5, dtype=np.int32), np.zeros(5, dtype=np.float32), 1)
    assert leakage_probes([masked], options, ENDS, 0) == []


def test_rows_too_short_to_try_are_an_error() -> None:
    with pytest.raises(JudgeError, match=r"t.jsonl: no row teaches 8 \+ 16 tokens in one run, .* with --set"):
        check_probes([], LeakageOptions(), "t.jsonl")


def test_leakage_finds_what_was_learned_by_heart_and_nothing_else(
    make_base: Callable[..., Base], memorised: Adapter, secrets: list[dict[str, Any]]
) -> None:
    model = attach(make_base())
    options = LeakageOptions(prefix_tokens=4, matched_tokens=16)
    attach(model, memorised, name="note")
    unseen: list[dict[str, Any]] = [{"prompt": "Who is it?", "completion": "Somebody that nobody has ever met here."}]

    def probes(rows: list[dict[str, Any]]) -> Any:
        return leakage_probes(load_data(rows, model.base, RAW).samples, options, ENDS, 0)

    def run(asked: Any) -> list[Answer]:
        with Engine(model) as engine:
            return engine.run(list[Request](asked))

    found = leakage([*probes(secrets), *probes(unseen)], probes(unseen), "note", options, Draw(), run, run)
    assert (found.rows, found.prefix_tokens, found.matched_tokens) == (3, 4, 16)
    assert found.adapter.value == pytest.approx(200 / 3)
    assert found.base.value == 0
    assert found.held_out is not None
    assert found.held_out.value == 0
    assert found.worst_rows == [2, 1]  # the longer match first
