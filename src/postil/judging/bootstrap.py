"""Paired bootstrap over rows: a measure with its interval, a difference with its verdict and what it could show."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from postil.errors import JudgeError
from postil.judging.card.model import Comparison, Estimate, rows_needed, verdict_of
from postil.judging.metrics.metric import Metric, Statistics
from postil.seeds import derive

POWER = 0.8
_CHUNK = 1 << 20  # resamples × rows drawn at once
_LEAST_TAIL = 5  # resamples beyond a percentile that is read off; with fewer, the normal interval

Values = NDArray[np.float64]


def estimate(
    metric: Metric, stats: Statistics, *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> Estimate:
    """The value of `stats` [rows, k] with its bootstrap interval (Efron and Tibshirani 1993, section 13.3).

    Where every row is right or none is, a share in percent has no spread to resample; its interval is then the exact
    one of Clopper and Pearson (1934): 20 right of 20 is "83 to 100". Raises JudgeError for an empty set, a value that
    is not finite, and a level or a number of resamples that cannot be.
    """
    stats = _checked(stats, resamples, level, looks=1)
    (stats,) = _counted(stats)
    (drawn,) = _resampled(metric, (stats,), seed, resamples)
    return _estimate(metric, stats, drawn, level)


def compare(
    metric: Metric,
    base: Statistics,
    adapter: Statistics,
    *,
    seed: int = 0,
    resamples: int = 1000,
    looks: int = 1,
    level: float = 0.95,
) -> Comparison:
    """Adapter beside base on the same rows, both [rows, k]: values, their difference, intervals, and the verdict.

    Paired: each resample draws the same rows for both (Koehn 2004; what sacrebleu does). With several looks at one
    set, slices for instance, the difference has a second interval, `corrected`, at the level 1 - (1 - level) / looks
    (Bonferroni). The verdict is "worse" where the plain interval leaves out zero, so that no number of looks hides
    harm, and "better" only where the corrected one does. Where fewer rows changed than a sign test needs
    (2 · 0.5^m ≤ 1 - level: six at 95%), the interval is made to hold zero, since the bootstrap is too sure there.
    `detectable` is the smallest gain that would have been shown with 80% power: (z_{1-a/2} + z_{0.8}) · standard
    error. Rows that a measure does not count (zeros on both sides: a row that wants a call, to the measure of
    refusals) are left out; `rows` is 0 where it counts none. The same seed gives the same result. Raises JudgeError
    as `estimate`, and where the two were not measured on the same rows.
    """
    base, adapter = _checked(base, resamples, level, looks), _checked(adapter, resamples, level, looks)
    if base.shape != adapter.shape:
        raise JudgeError(
            f"base and adapter must be measured on the same rows; {metric.name} has {base.shape[0]} rows × "
            f"{base.shape[1]} of the base and {adapter.shape[0]} × {adapter.shape[1]} of the adapter"
        )
    base, adapter = _counted(base, adapter)
    rows = len(base)
    drawn_base, drawn_adapter = _resampled(metric, (base, adapter), seed, resamples)
    before = _estimate(metric, base, drawn_base, level)
    after = _estimate(metric, adapter, drawn_adapter, level)
    gap = after.value - before.value
    changed = int((base != adapter).any(axis=1).sum())

    def interval(at: float) -> tuple[float, float]:
        low, high = _interval(gap, drawn_adapter - drawn_base, at, rows)
        return (min(low, 0.0), max(high, 0.0)) if changed < rows_needed(at) else (low, high)

    low, high = interval(level)
    difference, corrected = Estimate(value=gap, low=low, high=high), None
    strict = level if looks == 1 else 1 - (1 - level) / looks
    if looks > 1:
        wider = interval(strict)
        corrected = Estimate(value=gap, low=min(low, wider[0]), high=max(high, wider[1]))
    return Comparison(
        metric=metric.name,
        better=metric.better,
        unit=metric.unit,
        rows=rows if base.any() or adapter.any() else 0,
        base=before,
        adapter=after,
        difference=difference,
        corrected=corrected,
        level=level,
        verdict=verdict_of(metric.better, difference, corrected),
        detectable=_detectable(metric, gap, drawn_base, drawn_adapter, rows, strict),
    )


def row_values(metric: Metric, stats: Statistics) -> Values:
    """Each row's own part in the value of `stats` [rows, k]: jackknife pseudo-values (Efron and Tibshirani 1993,
    section 11.5), n · value - (n - 1) · value without the row; NaN for a row that the measure does not count.

    For a mean they are the rows' own values. So two systems are compared row by row by their means, whatever the
    measure, without its statistics being kept.
    """
    used = stats.any(axis=1)
    counted, out = int(used.sum()), np.full(len(stats), math.nan)
    if counted == 1:
        out[used] = _value(metric, stats.sum(axis=0))
    elif counted:
        sums = stats.sum(axis=0)
        without = np.asarray(metric.value(sums - stats[used]), dtype=np.float64)
        out[used] = counted * _value(metric, sums) - (counted - 1) * without
    return out


def _detectable(metric: Metric, gap: float, base: Values, adapter: Values, rows: int, level: float) -> float:
    """(t_{1-a/2, n-1} + z_{0.8}) · standard error of the difference, at least what the fewest telling rows make.

    Where the two do not differ by row, their paired spread is unknown; then each one's own spread stands in for it.
    The floor for a share in percent is the step of as many rows as a sign test needs.
    """
    normal = NormalDist()
    telling = normal.inv_cdf(1 - (1 - level) / 2)
    factor = (_student(telling, rows - 1) if rows > 1 else telling) + normal.inv_cdf(POWER)
    error = _error(adapter - base, rows)
    if error == 0:
        error = math.hypot(_error(base, rows), _error(adapter, rows))
    step = 100.0 if metric.unit == "%" else abs(gap) if error == 0 else 0.0
    return max(factor * error, step * rows_needed(level) / rows)


def _error(drawn: Values, rows: int) -> float:
    """The standard error that resamples show; drawing with replacement shrinks it by sqrt((n - 1) / n)."""
    return float(drawn.std()) * math.sqrt(rows / max(rows - 1, 1))


def _estimate(metric: Metric, stats: Statistics, drawn: Values, level: float) -> Estimate:
    value = _value(metric, stats.sum(axis=0))
    low, high = _interval(value, drawn, level, len(stats))
    if metric.unit == "%" and low == high and value in (0.0, 100.0):
        counted = int(stats.any(axis=1).sum())
        edge = (
            100 * ((1 - level) / 2) ** (1 / counted) if counted else 0.0
        )  # Clopper and Pearson 1934, all of n right
        low, high = (edge, 100.0) if value else (0.0, 100 - edge)
    return Estimate(value=value, low=low, high=high)


def _interval(value: float, drawn: Values, level: float, rows: int) -> tuple[float, float]:
    """The percentile interval; far in the tails, where too few resamples lie, value ± z · their standard deviation.

    Both are too narrow for few rows; the tail is widened as far as Student's t would (Hesterberg 2015, the expanded
    percentile interval): z = t_{1-a/2, n-1} · sqrt(n / (n - 1)).
    """
    z = NormalDist().inv_cdf(1 - (1 - level) / 2)
    if rows > 1:
        z = _student(z, rows - 1) * math.sqrt(rows / (rows - 1))
    tail = NormalDist().cdf(-z)
    if tail * len(drawn) >= _LEAST_TAIL:
        low, high = (float(end) for end in np.quantile(drawn, [tail, 1 - tail]))
        return min(low, value), max(high, value)
    half = z * float(drawn.std())
    return value - half, value + half


def _student(z: float, freedom: int) -> float:
    """The quantile of Student's t at the normal quantile z (Abramowitz and Stegun 1964, 26.7.5)."""
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def _value(metric: Metric, sums: Statistics) -> float:
    return float(metric.value(sums))


def _checked(stats: Statistics, resamples: int, level: float, looks: int) -> Statistics:
    stats = np.asarray(stats, dtype=np.float64)
    if stats.ndim != 2 or not stats.size:
        raise JudgeError("an empty set cannot be judged; it needs one row at least")
    if not np.isfinite(stats).all():
        row = int(np.flatnonzero(~np.isfinite(stats).all(axis=1))[0]) + 1
        raise JudgeError(f"row {row} has a measure that is not finite, so no interval can be given")
    if not 0 < level < 1 or looks < 1 or resamples < 1:
        raise JudgeError(
            f"level must lie between 0 and 1, looks and resamples be 1 or more; found {level}, {looks}, {resamples}"
        )
    return stats


def _counted(*systems: Statistics) -> tuple[Statistics, ...]:
    """The rows that any of the systems counts; one empty row where there is none."""
    used = np.logical_or.reduce([stats.any(axis=1) for stats in systems])
    used[0] |= not used.any()
    return tuple(stats[used] for stats in systems)


def _resampled(metric: Metric, systems: tuple[Statistics, ...], seed: int, resamples: int) -> list[Values]:
    """The metric's value on `resamples` draws of the rows with replacement, the same draws for every system."""
    width = systems[0].shape[1]
    joined = np.concatenate(systems, axis=1)  # [rows, systems · k]
    values: list[list[Values]] = [[] for _ in systems]
    for weights in _draws(len(joined), seed, resamples):
        sums = weights @ joined  # [draws, rows] @ [rows, systems · k]
        for i, known in enumerate(values):
            known.append(np.asarray(metric.value(sums[:, i * width : (i + 1) * width])))
    return [np.concatenate(known) for known in values]


def _draws(rows: int, seed: int, resamples: int) -> Iterator[Values]:
    """How often each row was drawn, float64 [draws, rows], chunk by chunk; chunks do not change the draws."""
    random = np.random.Generator(np.random.PCG64(derive(seed, "bootstrap")))
    size = max(1, _CHUNK // rows)
    for start in range(0, resamples, size):
        draws = min(size, resamples - start)
        picked = random.integers(0, rows, size=(draws, rows))
        picked += np.arange(draws)[:, None] * rows
        yield np.bincount(picked.ravel(), minlength=draws * rows).reshape(draws, rows).astype(np.float64)
