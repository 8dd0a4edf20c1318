"""The demo's gain of a note: by how much better per token, with its interval."""

from __future__ import annotations

from pathlib import Path

import pytest

from postil.base import load_base
from postil.demo.run import BASE, gain
from postil.demo.work import Plan


def test_a_gain_is_positive_where_the_note_has_fewer_nats() -> None:
    base = [(4.0 + n % 3, 2) for n in range(30)]
    adapted = [(2.0 + n % 3, 2) for n in range(30)]  # one nat a token better in each
    found = gain(base, adapted)
    assert found.value == pytest.approx(1.0)
    assert 0 < found.low <= found.value <= found.high
    worse = gain(adapted, base)
    assert (worse.value, worse.low, worse.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_a_gain_that_chance_may_be_has_zero_in_its_interval() -> None:
    base = [(1.0 + 4 * (n % 2), 1) for n in range(20)]
    assert gain(base, base).low <= 0
    assert gain(base, list(reversed(base))).low < 0


@pytest.mark.base
def test_there_is_enough_general_text_for_the_real_tokenizer() -> None:
    found = Plan(BASE, "cpu", Path()).texts(load_base(BASE).tokenizer)
    assert sum(len(window.ids) for window in found) >= 8_000
    assert max(len(window.ids) for window in found) <= 512
    assert all(window.weights[0] == 0 and window.weights[1:].all() for window in found)
