"""Choosing a token: a row whose logits are no numbers has no choice, and the others have theirs."""

from __future__ import annotations

import math

import pytest
import torch

from postil.engine import Request
from postil.engine.sampler import choose, generator_of

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("broken", [[NAN, 1.0, 2.0], [0.0, NAN, 2.0], [1.0, INF, 0.0], [-INF, -INF, -INF], [NAN] * 3])
def test_a_row_of_values_that_are_not_finite_has_no_choice(broken: list[float], temperature: float) -> None:
    requests = [Request(ids=(1,), temperature=temperature, logprobs=True)] * 3
    rows = torch.tensor([[0.0, 9.0, -INF], broken, [-INF, -INF, 3.0]])
    first, none, last = choose(rows, requests, [generator_of(request) for request in requests])
    assert none is None
    assert first is not None
    assert last is not None
    assert (last.token, last.margin, last.logprob) == (2, INF, 0.0)
    assert first.token in (0, 1)
    assert math.isfinite(first.margin)
    if temperature == 0:
        assert first.token == 1
