"""Row values as text: what was packed comes back, small, and what was not packed is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from postil.errors import JudgeError
from postil.judging.card.row_values import packed, unpacked


def test_what_was_packed_comes_back_and_is_small() -> None:
    right = np.random.default_rng(0).integers(0, 2, 1000) * 100.0
    assert unpacked(packed(right)).tolist() == right.tolist()
    assert len(packed(right)) < 500
    values = np.array([0.1, math.nan, 1e300])
    found = unpacked(packed(values))
    assert found[0] == pytest.approx(0.1)
    assert np.isnan(found[1])
    assert np.isinf(found[2])
    assert unpacked(packed(np.zeros(0))).tolist() == []


@pytest.mark.parametrize("text", ["nothing", "bm90aGluZw==", "ä", packed(np.ones(3))[:-8]])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(JudgeError, match="row_values cannot be read"):
        unpacked(text)
