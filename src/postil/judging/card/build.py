"""A part of the score card from the statistics of base and adapter: on the whole set, and on each slice of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from postil.errors import InternalError, JudgeError, listed, nearest
from postil.judging.bootstrap import compare, estimate, row_values
from postil.judging.card.definition import definition_of
from postil.judging.card.model import Comparison, DataUsed, Estimate, Part
from postil.judging.card.row_values import packed
from postil.judging.metrics.metric import Metric, Row, Statistics, mean_of

Measured = dict[str, Statistics]  # by measure: [units, k]
Slices = dict[str, dict[str, NDArray[np.int64]]]  # column → value → units
OTHERS = "(others)"  # the slice of a column's rare values


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
    defined: Mapping[str, Any] | None = None,
    defined_each: Mapping[str, Mapping[str, Any]] | None = None,
) -> Part:
    """Base beside adapter by every measure. A gain in a slice is corrected for all slices looked at, harm is not.

    defined, defined_each: what defines every measure, and by name what defines one, beyond its name (see
    definition.py); without `defined` the measures have no definition.
    """
    looks = sum(len(values) for values in (slices or {}).values())

    def compared(name: str, units: NDArray[np.int64] | None = None) -> Comparison:
        before, after = (base[name], adapter[name]) if units is None else (base[name][units], adapter[name][units])
        found = compare(
            metrics[name], before, after, seed=draw.seed, resamples=draw.resamples, level=draw.level,
            looks=1 if units is None else looks,
        )  # fmt: skip
        told = {
            "definition": definition_of(name, {**defined, **(defined_each or {}).get(name, {})}) if defined else "",
            "row_values": packed(row_values(metrics[name], after)) if name == main else "",
        }
        return found.model_copy(update=told)

    return Part(
        data=data,
        main=main,
        measures={name: compared(name) for name in base},
        few_shot={name: estimated(metrics[name], found, draw) for name, found in (few_shot or {}).items()},
        shots=shots,
        slices={
            column: {value: {name: compared(name, units) for name in base} for value, units in values.items()}
            for column, values in (slices or {}).items()
        },
    )


def estimated(metric: Metric, found: Statistics, draw: Draw) -> Estimate:
    """The value of one model alone, with its interval."""
    return estimate(metric, found, seed=draw.seed, resamples=draw.resamples, level=draw.level)


def slices_of(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], smallest: int
) -> tuple[Slices, dict[str, list[str]]]:
    """The units of each value of each column that the rows have; a list of tags puts a row into several.

    Values with fewer than `smallest` units are one slice together, OTHERS; where they are too few even together, it
    is filled up with the next rarest value, so that every row which has the column is looked at. The second result:
    by column, the small values.
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
        rare = [value for value, units in found.items() if len(units) < smallest or value == OTHERS]
        others = {unit for value in rare for unit in found[value]}
        for value in sorted(set(found) - set(rare), key=lambda one: (len(found[one]), one)):
            if not 0 < len(others) < smallest:
                break
            others.update(found[value])
        if found:
            slices[column] = {value: np.array(found[value]) for value in sorted(found) if value not in rare}
        if rare:
            slices[column][OTHERS] = np.array(sorted(others))
            small[column] = sorted(rare)
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
