"""Metric: per-row statistics whose sum gives the corpus value, so that one bootstrap serves every measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Row = Mapping[str, Any]
Statistics = NDArray[np.float64]  # [rows, k]
Look = Callable[[Sequence[Row]], Sequence[str]]


def _nothing_to_say(_: Sequence[Row]) -> Sequence[str]:
    return ()


@dataclass(frozen=True, slots=True)
class Metric:
    """A measure of answers against rows.

    statistics(answers, rows) gives float64 [rows, k]; value maps sums of statistics [..., k] to values [...].
    A mean has k = 2 (sum, count); BLEU has its n-gram counts. unit: what the value counts ("%", "nats/token").
    look: what a user should know of how a set of rows is measured, asked before the work; it raises JudgeError where
    the measure would say nothing of them.
    """

    name: str
    better: Literal["higher", "lower"]
    unit: str
    statistics: Callable[[Sequence[str], Sequence[Row]], Statistics]
    value: Callable[[Statistics], NDArray[np.float64]]
    look: Look = _nothing_to_say

    @property
    def sign(self) -> int:
        """+1 where more is better, -1 where less is."""
        return 1 if self.better == "higher" else -1


def mean_of(sums: Statistics) -> NDArray[np.float64]:
    """The value of a mean from (sum, count) statistics: sum / count, 0 where nothing was counted."""
    total, count = sums[..., 0], sums[..., 1]
    return np.divide(total, count, out=np.zeros_like(total), where=count > 0)
