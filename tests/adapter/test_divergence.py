"""KL(base||adapted) on a pack: equals softmax by softmax, moves the adapter alone, and needs its Layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from postil.adapter import AdaptedModel, LoraConfig, attach
from postil.adapter.divergence import base_states, kl_to_base
from postil.errors import InternalError
from postil.kernels.layout import Layout, Span, Spans, positions_of

LENGTHS = (7, 12, 1, 5)
IDS = torch.randint(3, 101, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3))
POSITIONS = positions_of(LENGTHS)
ROWS = torch.tensor([0, 3, 6, 7, 18, 19, 24])


def written(lab: Any, name: str = "llama", **settings: Any) -> AdaptedModel:
    model = attach(lab.tiny(name), LoraConfig(r=3, **settings), seed=0)
    lab.scramble(model, size=0.3)
    return model


def whole(model: AdaptedModel) -> Layout:
    return Layout.packed(LENGTHS, Spans((Span(0, len(IDS), model.resident("default").slot),)))


def expected(lab: Any, model: AdaptedModel) -> torch.Tensor:
    """KL of every row from plain forward calls, one sequence at a time."""
    parts, start = [], 0
    for length in LENGTHS:
        ids = IDS[start : start + length]
        model.activate("default")
        q = lab.plain(model, ids).log_softmax(-1)
        with model.disabled():
            p = lab.plain(model, ids).log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1))
        start += length
    return torch.cat(parts)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon"])
def test_it_is_the_kl_of_the_plain_models(name: str, lab: Any) -> None:
    model = written(lab, name, target_modules="all-linear")
    with torch.no_grad(), model.using(whole(model)):
        total, rows = kl_to_base(model, IDS, POSITIONS, ROWS)
    wanted = expected(lab, model)[ROWS]
    assert wanted.min() > 1e-4
    torch.testing.assert_close(rows, wanted, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(total, wanted.sum(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_the_gradient_is_that_of_all_logits_at_once(lab: Any, settings: dict[str, Any]) -> None:
    model = written(lab, **settings)
    resident = model.resident("default")
    resident.train()
    with model.using(whole(model)):
        total, _ = kl_to_base(model, IDS, POSITIONS, ROWS)
        total.backward()
    assert resident.grad is not None
    got = resident.grad.clone()
    resident.grad.zero_()
    with model.using(whole(model)):
        states = model.hidden(IDS, POSITIONS)[ROWS]
        q = model.head_on(ROWS)(states, 0, len(ROWS)).log_softmax(-1)
        base = base_states(model, IDS, POSITIONS, ROWS)
        p = model.logits(base, Spans()).detach().log_softmax(-1)
        (p.exp() * (p - q)).sum().backward()
    assert got.abs().max() > 1e-3
    torch.testing.assert_close(got, resident.grad, rtol=1e-4, atol=1e-5)
    assert not any(parameter.grad is not None for parameter in model.model.parameters())


def test_rows_in_no_span_are_the_bases_own(lab: Any) -> None:
    model = written(lab)
    layout = Layout.packed(LENGTHS, Spans((Span(0, 7, model.resident("default").slot),)))
    with torch.no_grad(), model.using(layout):
        _, rows = kl_to_base(model, IDS, POSITIONS, ROWS)
        assert model.layout is layout
    assert (rows[:3] > 1e-4).all()
    assert rows[3:].abs().max() < 1e-6


def test_it_needs_a_layout(lab: Any) -> None:
    model = written(lab)
    with pytest.raises(InternalError, match="needs a Layout in force"):
        kl_to_base(model, IDS, POSITIONS, ROWS)
