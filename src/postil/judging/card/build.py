"""A part of the score card from the statistics of base and adapter: on the whole set, and on each slice of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from postil.errors import InternalError, JudgeError, listed, nearest
from postil.judging.bootstrap import compare, estimate
from postil.judging.card.model import Comparison, DataUsed, Estimate, Part
from postil.judging.metrics.metric import Metric, Row, Statistics, mean_of

Measured = dict[str, Statistics]  # by measure: [units, k]
Slices = dict[str, dict[str, NDArray[np.int64]]]  # column → value → units


@dataclass(frozen=True, slots=True)
class Draw:
    """How intervals are drawn: the bootstrap's seed and resamples, and the level of the interval."""

    seed: int = 0
    resamples: int = 1000
    level: float = 0.95


def measured(name: str, better: Literal["higher", "lower"], unit: str) -> Metric:
    """A mean whose (sum, count) statistics come from the model itself, not from answers."""

    def statistics(answers: Sequence[str], rows: Sequence[Row]) -> Statistics:
        raise InternalError(f"{name} is measured by likelihood, not from answers")

    return Metric(name, better, unit, statistics, mean_of)


NATS = measured("nats", "lower", "nats/token")
KL = measured("kl", "lower", "nats/token")
ACCURACY = measured("accuracy", "higher", "%")
PER_TOKEN = measured("accuracy_per_token", "higher", "%")


def part_of(
    data: DataUsed,
    main: str,
    metrics: Mapping[str, Metric],
    base: Measured,
    adapter: Measured,
    draw: Draw,
    *,
    slices: Slices | None = None,
    few_shot: Measured | None = None,
    shots: int = 0,
) -> Part:
    """Base beside adapter by every measure. A slice's interval is corrected for all slices looked at."""
    looks = sum(len(values) for values in (slices or {}).values())
    return Part(
        data=data,
        main=main,
        measures={name: _compared(metrics[name], base[name], adapter[name], draw) for name in base},
        few_shot={name: estimated(metrics[name], found, draw) for name, found in (few_shot or {}).items()},
        shots=shots,
        slices={
            column: {
                value: {
                    name: _compared(metrics[name], base[name][units], adapter[name][units], draw, looks)
                    for name in base
                }
                for value, units in values.items()
            }
            for column, values in (slices or {}).items()
        },
    )


def _compared(metric: Metric, base: Statistics, adapter: Statistics, draw: Draw, looks: int = 1) -> Comparison:
    return compare(
        metric, base, adapter, seed=draw.seed, resamples=draw.resamples, looks=looks, level=draw.level
    )  # fmt: skip


def estimated(metric: Metric, found: Statistics, draw: Draw) -> Estimate:
    """The value of one model alone, with its interval."""
    return estimate(metric, found, seed=draw.seed, resamples=draw.resamples, level=draw.level)


def slices_of(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], smallest: int
) -> tuple[Slices, dict[str, list[str]]]:
    """The units of each value of each column that the rows have; a list of tags puts a row into several.

    The second result: by column, the values with fewer than `smallest` units, which get no slice.
    """
    slices: Slices = {}
    small: dict[str, list[str]] = {}
    for column in columns:
        found: dict[str, list[int]] = {}
        for unit, row in enumerate(rows):
            value = row.get(column)
            values = value if isinstance(value, list) else [value]
            for one in dict.fromkeys(str(one) for one in values if isinstance(one, str | int | float | bool)):
                if not one.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in one):
                    raise JudgeError(
                        f"slices: a value of {column} holds half a surrogate pair, which is no text: {one!a}"
                    )
                found.setdefault(one, []).append(unit)
        kept = {value: np.array(units) for value, units in sorted(found.items()) if len(units) >= smallest}
        if kept:
            slices[column] = kept
        if len(kept) < len(found):
            small[column] = sorted(set(found) - set(kept))
    return slices, small


def check_columns(columns: Sequence[str], sets: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Raise JudgeError for a column that no set's rows have."""
    known = list(dict.fromkeys(key for rows in sets for row in rows for key in row))
    for column in columns:
        if column not in known:
            raise JudgeError(
                f"slices: no row has a column {column!r}{nearest(column, known)}; there are: {listed(known)}"
            )


def stats_of(losses: Sequence[tuple[float, int]]) -> Statistics:
    """(sum, count) of each unit as statistics [units, 2]."""
    return np.array(losses, dtype=np.float64).reshape(-1, 2)


def hits(right: Sequence[bool]) -> Statistics:
    """Right or wrong per unit as statistics [units, 2] of a percentage."""
    return np.array([(100.0 if one else 0.0, 1.0) for one in right], dtype=np.float64).reshape(-1, 2)
