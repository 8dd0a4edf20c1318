"""Rows of a step that begin alike have their beginning computed once; nothing else is changed by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import options_of, tiny_model, tiny_samples

from postil.adapter import AdaptedModel, LoraConfig, attach
from postil.data import Sample
from postil.training import train
from postil.training.batch import shares
from postil.training.optimizer import AdapterWeights, FullWeights, Trainable
from postil.training.step import gradients, steps_of
from postil.training.validation import validate

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def alike(count: int = 23) -> list[Sample]:
    """The tiny samples behind a system turn of all and one of two instructions."""
    system, instructions = np.arange(9), (np.arange(20, 31), np.arange(40, 50))
    made = []
    for sample in tiny_samples(count):
        ids = np.concatenate([system, instructions[sample.row % 2], sample.ids]).astype(np.int32)
        weights = np.concatenate([np.zeros(len(ids) - len(sample.ids)), sample.weights]).astype(np.float32)
        made.append(Sample(ids, weights, sample.row))
    return made


def step_of(model: AdaptedModel, share: bool, full: bool, **settings: Any) -> tuple[float, int, int, torch.Tensor]:
    """(loss, tokens of its rows, tokens computed, gradient) of a first step."""
    options = options_of(method="full" if full else "lora", **settings)
    resident = None if full else model.resident("default")
    weights: Trainable = AdapterWeights.of(resident) if resident else FullWeights.of(model.model)
    _, packs = next(steps_of(alike(), options, 0, 1, share=share))
    loss, tokens, _ = gradients(model, weights, resident, packs, options, 1)
    return loss, tokens, sum(len(pack.ids) for pack in packs), weights.grad.clone()


def adapted(**lora: Any) -> AdaptedModel:
    model = tiny_model()
    attach(model, LoraConfig(r=4, target_modules="all-linear", **lora), seed=1)
    resident = model.resident("default")
    torch.manual_seed(3)
    resident.flat.add_(0.02 * torch.randn_like(resident.flat))  # B too, so that every leaf has a gradient
    return model


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"accumulation": 2}, {"pack_tokens": 130}, {"gradient_checkpointing": True}]
)
def test_the_gradient_is_that_of_whole_rows(settings: dict[str, Any], full: bool) -> None:
    def step(share: bool) -> tuple[float, int, int, torch.Tensor]:
        model = tiny_model() if full else adapted()
        model.checkpointing = "gradient_checkpointing" in settings
        return step_of(model, share, full, **settings)

    loss, tokens, computed, gradient = step(True)
    wanted_loss, wanted_tokens, all_computed, wanted = step(False)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert tokens == wanted_tokens == all_computed
    assert computed < 0.75 * all_computed
    assert wanted.abs().max() > 1e-2
    torch.testing.assert_close(gradient, wanted, **TOLERANCE)


def test_a_run_learns_the_same() -> None:
    results, losses = [], []
    for share in (True, False):
        model = adapted()
        if not share:
            model.packs = False  # each row by itself
        events: list[dict[str, Any]] = []
        train(model, alike(), valid=alike(5), epochs=2, learning_rate=1e-2, watch=events.append)
        results.append(model.resident("default").flat.clone())
        losses.append([event["valid_loss"] for event in events if "valid_loss" in event])
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_validation_is_that_of_whole_rows() -> None:
    model, held_out = adapted(dropout=0.5), alike()
    resident = model.resident("default")
    seen: list[int] = []
    original = model.loss
    model.loss = lambda ids, *rest: seen.append(len(ids)) or original(ids, *rest)  # type: ignore[method-assign,func-returns-value]
    together = validate(model, held_out, resident, 4096)
    one_by_one = [(validate(model, [sample], resident, 4096), sample.target_tokens) for sample in held_out]
    total = sum(count for _, count in one_by_one)
    assert together == pytest.approx(sum(mean * count for mean, count in one_by_one) / total, rel=1e-5)
    assert seen[0] < 0.75 * sum(seen[1:])


def test_dropout_keeps_rows_whole() -> None:
    """Each row has a mask of its own, in its beginning too."""
    model = adapted(dropout=0.1)
    assert not shares(model, model.resident("default"))
    assert shares(adapted(), adapted().resident("default"))
    assert shares(tiny_model(), None)


def test_a_broken_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    class Broken(Exception):
        pass

    def break_off(event: dict[str, Any]) -> None:
        if event["step"] == 5:
            raise Broken

    results = []
    for place, watch in (("whole", None), ("broken", break_off), ("broken", None)):
        model = adapted()
        try:
            train(model, alike(), valid=alike(4), out=tmp_path / place, epochs=3, checkpoint_every=2, watch=watch)
        except Broken:
            continue
        results.append(model.resident("default").flat.numpy().tobytes())
    assert results[0] == results[1]
