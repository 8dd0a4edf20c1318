"""The paired bootstrap: coverage, verdicts by orientation, few rows, several looks, one seed, sets that cannot be."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from postil.errors import JudgeError
from postil.judging import bootstrap as statistics
from postil.judging.bootstrap import compare, estimate, row_values
from postil.judging.card.model import Estimate, verdict_of
from postil.judging.metrics import metric_named
from postil.judging.metrics.metric import Metric, Row, Statistics, mean_of

Numbers = NDArray[np.float64]


def unmeasured(answers: object, rows: object) -> Statistics:
    raise AssertionError("these tests give the statistics themselves")


POINTS = Metric("points", "higher", "points", unmeasured, mean_of)
NATS = Metric("nats", "lower", "nats/token", unmeasured, mean_of)
SHARE = Metric("share", "higher", "%", unmeasured, mean_of)


def rows_of(values: Numbers | list[float]) -> Statistics:
    """(value, 1) for each row."""
    found = np.asarray(values, dtype=np.float64)
    return np.stack([found, np.ones_like(found)], axis=1)


def pair(random: np.random.Generator, rows: int, gain: float) -> tuple[Statistics, Statistics]:
    """Two systems on rows of very different difficulty; the second is better by `gain` on average."""
    shared = 10 * random.normal(size=rows)
    return rows_of(shared + random.normal(size=rows)), rows_of(shared + gain + random.normal(size=rows))


@pytest.mark.parametrize("rows", [12, 60])
def test_the_interval_holds_a_known_difference_in_95_of_100_sets(rows: int) -> None:
    random = np.random.default_rng(rows)
    held = [
        compared.difference.low <= 0.5 <= compared.difference.high
        for seed in range(300)
        for compared in [compare(POINTS, *pair(random, rows, 0.5), seed=seed, resamples=300)]
    ]
    assert 0.91 <= np.mean(held) <= 0.985


def test_a_single_value_has_its_interval() -> None:
    random = np.random.default_rng(0)
    held = [
        found.low <= 3 <= found.high
        for seed in range(300)
        for found in [estimate(POINTS, rows_of(3 + random.normal(size=40)), seed=seed, resamples=300)]
    ]
    assert 0.91 <= np.mean(held) <= 0.985
    sample = rows_of(3 + random.normal(size=400))
    found = estimate(POINTS, sample)
    assert found.value == pytest.approx(sample[:, 0].mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * sample[:, 0].std() / 20, rel=0.1)


def test_the_standard_error_is_of_the_differences_and_gives_what_could_be_shown() -> None:
    base, adapter = pair(np.random.default_rng(1), 500, 0.3)
    found = compare(POINTS, base, adapter, resamples=2000)
    error = (adapter - base)[:, 0].std(ddof=1) / math.sqrt(500)
    z, power = NormalDist().inv_cdf(0.975), NormalDist().inv_cdf(0.8)
    assert found.detectable == pytest.approx((z + power) * error, rel=0.06)
    assert found.difference.high - found.difference.value == pytest.approx(z * error, rel=0.1)
    assert found.base.high - found.base.low > 5 * (found.difference.high - found.difference.low)  # pairing pays


def test_an_effect_as_large_as_detectable_is_shown_in_80_of_100_sets() -> None:
    random = np.random.default_rng(2)
    size = compare(POINTS, *pair(random, 60, 0)).detectable
    shown = [compare(POINTS, *pair(random, 60, size), seed=s, resamples=300).verdict == "better" for s in range(200)]
    assert 0.7 <= np.mean(shown) <= 0.9


@pytest.mark.parametrize("rows", [2, 5, 6, 10])
def test_few_rows_never_promise_more_than_their_interval(rows: int) -> None:
    random = np.random.default_rng(rows)
    for _ in range(20):
        found = compare(NATS, *pair(random, rows, 0))
        assert found.too_few == (rows < 6)  # whose interval always holds zero
        assert found.too_few or found.detectable >= 0.9 * (found.difference.high - found.difference.low) / 2


def test_verdicts_follow_what_is_better() -> None:
    base, adapter = pair(np.random.default_rng(3), 80, 1.0)
    assert compare(POINTS, base, adapter).verdict == "better"
    assert compare(POINTS, adapter, base).verdict == "worse"
    assert compare(NATS, base, adapter).verdict == "worse"
    lower = compare(NATS, adapter, base)
    assert lower.verdict == "better"
    assert lower.difference.high < 0 < lower.detectable
    assert (lower.metric, lower.better, lower.unit, lower.rows) == ("nats", "lower", "nats/token", 80)
    assert lower.difference.value == pytest.approx(lower.adapter.value - lower.base.value)
    for low, high, says in ((0, 1, "no evidence"), (-1, 0, "no evidence"), (0.1, 1, "better"), (-1, -0.1, "worse")):
        assert verdict_of("higher", Estimate(value=0.5 * (low + high), low=low, high=high)) == says
    for better in ("higher", "lower"):
        for high in (math.nan, 1.0):
            unknown = Estimate(value=math.nan, low=math.nan, high=high)
            assert verdict_of(better, unknown) == "no evidence"  # type: ignore[arg-type]


def test_equal_systems_are_no_evidence_and_still_say_what_could_be_shown() -> None:
    base, _ = pair(np.random.default_rng(4), 50, 0)
    for metric in (POINTS, NATS, SHARE):
        found = compare(metric, base, base.copy())
        assert found.verdict == "no evidence"
        assert found.difference.value == found.difference.low == found.difference.high == 0
        assert found.detectable > 1  # by the systems' own spread


def test_all_differences_equal() -> None:
    rows = np.arange(20.0)
    found = compare(POINTS, rows_of(rows), rows_of(rows + 2))
    assert found.verdict == "better"
    assert found.difference.low == pytest.approx(2)
    assert found.difference.high == pytest.approx(2)
    flat = compare(SHARE, rows_of([0.0] * 200), rows_of([100.0] * 200))
    assert (flat.verdict, flat.detectable) == ("better", 3.0)  # six rows of 200


@pytest.mark.parametrize(("changed", "says"), [(0, "no evidence"), (5, "no evidence"), (6, "better")])
def test_fewer_changed_rows_than_a_sign_test_needs_are_no_evidence(changed: int, says: str) -> None:
    """Five rows won and none lost: a sign test gives 0.0625, the plain bootstrap only 0.007."""
    adapter = [100.0] * changed + [0.0] * (300 - changed)
    found = compare(SHARE, rows_of([0.0] * 300), rows_of(adapter))
    assert found.verdict == says
    assert (found.difference.low > 0) is (says == "better")
    assert found.detectable >= 2  # six rows of 300


def test_one_row_is_no_evidence() -> None:
    for metric in (SHARE, POINTS):
        found = compare(metric, rows_of([0.0]), rows_of([100.0]))
        assert found.verdict == "no evidence"
        assert (found.difference.low, found.difference.value, found.difference.high) == (0, 100, 100)
        assert found.detectable == 600  # no set of one row can show anything on a scale of 100
    assert compare(POINTS, rows_of([3.0]), rows_of([3.0])).verdict == "no evidence"


def test_all_right_is_not_certain() -> None:
    found = estimate(SHARE, rows_of([100.0] * 20))
    assert (found.value, found.high) == (100, 100)
    assert found.low == pytest.approx(100 * 0.025 ** (1 / 20))  # Clopper and Pearson: 83.2
    found = estimate(SHARE, rows_of([0.0] * 20))
    assert (found.low, found.value) == (0, 0)
    assert found.high == pytest.approx(100 - 100 * 0.025 ** (1 / 20))
    uncounted = estimate(SHARE, np.zeros((5, 2)))
    assert (uncounted.low, uncounted.high) == (0, 100)


def test_several_looks_widen_the_interval_that_a_gain_must_show_in() -> None:
    base, adapter = pair(np.random.default_rng(5), 100, 0.42)
    one, ten = compare(POINTS, base, adapter), compare(POINTS, base, adapter, looks=10)
    assert one.corrected is None
    assert ten.corrected is not None
    assert (one.base, one.adapter, one.difference, one.level) == (ten.base, ten.adapter, ten.difference, ten.level)
    assert ten.corrected.low < ten.difference.low < ten.difference.high < ten.corrected.high
    assert (one.verdict, ten.verdict) == ("better", "no evidence")
    assert ten.detectable > one.detectable
    many = compare(POINTS, base, adapter, looks=1000).corrected  # beyond what resamples reach: the normal interval
    assert many is not None
    assert many.high - many.value == pytest.approx(many.value - many.low)
    assert many.high - many.low > 1.2 * (ten.corrected.high - ten.corrected.low)


@pytest.mark.parametrize("looks", [1, 20, 40, 77, 200])
def test_no_number_of_looks_hides_harm(looks: int) -> None:
    """Ten rows that fall from 100% to 0%, and twenty from 100% to 55%, among so many slices."""
    fallen = compare(SHARE, rows_of([100.0] * 10), rows_of([0.0] * 10), looks=looks)
    assert fallen.verdict == "worse"
    halved = compare(SHARE, rows_of([100.0] * 20), rows_of([100.0] * 11 + [0.0] * 9), looks=looks)
    assert halved.verdict == "worse"
    risen = compare(SHARE, rows_of([0.0] * 10), rows_of([100.0] * 10), looks=looks)
    assert risen.verdict == ("better" if looks <= 20 else "no evidence")  # a gain still pays for the looks


def test_an_interval_holds_its_value() -> None:
    random = np.random.default_rng(7)
    labels = metric_named("macro_f1", {"labels": tuple("abcdefgh")})
    for _ in range(30):
        rows: list[Row] = [{"completion": random.choice(list("abcdefgh"))} for _ in range(9)]
        found = compare(
            labels, *(labels.statistics([random.choice(list("abcdefgh")) for _ in rows], rows) for _ in "ab")
        )
        for one in (found.base, found.adapter, found.difference):
            assert one.low <= one.value <= one.high  # a resample often lacks a label: the draws lie beside the value


def test_row_values_are_a_means_rows_and_stand_for_any_measure() -> None:
    means = rows_of([3.0, 5.0, 10.0])
    assert row_values(POINTS, means).tolist() == pytest.approx([3, 5, 10])
    idle = np.concatenate([means, np.zeros((1, 2))])
    assert np.isnan(row_values(POINTS, idle)[3])
    assert row_values(POINTS, rows_of([7.0])).tolist() == [7]
    weighed = np.array([[10.0, 5.0], [1.0, 1.0], [30.0, 10.0]])  # nats, tokens
    assert row_values(NATS, weighed).mean() == pytest.approx(41 / 16, rel=0.1)
    rows: list[Row] = [{"references": [f"the cat number {i} sat on the mat today"]} for i in range(40)]
    answers = [row["references"][0] if i % 2 else "a dog ran over the hill" for i, row in enumerate(rows)]
    metric = metric_named("bleu")
    stats = metric.statistics(answers, rows)
    values = row_values(metric, stats)
    found = compare(metric, stats, stats).adapter
    assert values.mean() == pytest.approx(found.value, abs=0.5)
    error = values.std(ddof=1) / math.sqrt(40)
    assert error == pytest.approx(
        (found.high - found.low) / 2 / 1.96, rel=0.15
    )  # the jackknife's and the bootstrap's


def test_one_seed_gives_one_result_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = pair(np.random.default_rng(6), 37, 0.2)
    first = compare(POINTS, base, adapter, seed=3)
    assert compare(POINTS, base, adapter, seed=3) == first
    assert compare(POINTS, base, adapter, seed=4) != first
    assert estimate(POINTS, base, seed=3) == first.base
    monkeypatch.setattr(statistics, "_CHUNK", 100)  # two resamples at once
    cut = compare(POINTS, base, adapter, seed=3)
    assert cut.difference.low == pytest.approx(first.difference.low, rel=1e-12)
    assert cut.difference.high == pytest.approx(first.difference.high, rel=1e-12)


def test_memory_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def seen(sums: Statistics) -> Numbers:
        shapes.append(sums.shape)
        return mean_of(sums)

    metric = Metric("seen", "higher", "points", unmeasured, seen)
    estimate(metric, rows_of(np.arange(200_000.0)), resamples=12)
    assert max(math.prod(shape[:-1]) for shape in shapes) <= statistics._CHUNK // 200_000


def test_a_corpus_measure_is_resampled_by_its_sums() -> None:
    rows: list[Row] = [{"references": [f"the cat number {i} sat on the mat today"]} for i in range(40)]
    right = [row["references"][0] for row in rows]
    wrong = [text.replace("sat on", "was at") if i % 2 else text for i, text in enumerate(right)]
    metric = metric_named("bleu")
    base, adapter = metric.statistics(wrong, rows), metric.statistics(right, rows)
    found = compare(metric, base, adapter, resamples=400)
    assert found.verdict == "better"
    assert found.adapter.value == pytest.approx(100)
    weights = np.random.default_rng(0).multinomial(40, [1 / 40] * 40, size=400).astype(np.float64)
    values = metric.value(weights @ base)
    assert found.base.low == pytest.approx(np.quantile(values, 0.022), abs=1.5)
    assert found.base.low < found.base.value < found.base.high


@pytest.mark.parametrize(
    ("stats", "settings", "wrong"),
    [
        (np.zeros((0, 2)), {}, "an empty set cannot be judged"),
        (rows_of([1.0, math.nan]), {}, "row 2 has a measure that is not finite"),
        (rows_of([math.inf, 1.0]), {}, "row 1 has a measure that is not finite"),
        (rows_of([1.0, 2.0]), {"level": 1.0}, "level must lie between 0 and 1"),
        (rows_of([1.0, 2.0]), {"resamples": 0}, "resamples be 1 or more"),
    ],
)
def test_sets_that_cannot_be_judged(stats: Statistics, settings: dict[str, float], wrong: str) -> None:
    with pytest.raises(JudgeError, match=wrong):
        estimate(POINTS, stats, **settings)  # type: ignore[arg-type]
    with pytest.raises(JudgeError, match=wrong):
        compare(POINTS, stats, stats, **settings)  # type: ignore[arg-type]


def test_looks_and_rows_must_fit() -> None:
    with pytest.raises(JudgeError, match="looks and resamples be 1 or more"):
        compare(POINTS, rows_of([1.0]), rows_of([1.0]), looks=0)
    with pytest.raises(JudgeError, match="points has 2 rows × 2 of the base and 1 × 2 of the adapter"):
        compare(POINTS, rows_of([1.0, 2.0]), rows_of([1.0]))


def test_rows_that_a_measure_does_not_count_are_no_rows_of_its() -> None:
    random = np.random.default_rng(0)
    base, adapter = rows_of((random.random(20) < 0.4) * 100.0), rows_of((random.random(20) < 0.6) * 100.0)
    idle = np.zeros((980, 2))
    alone = compare(SHARE, base, adapter)
    among = compare(SHARE, np.concatenate([idle, base]), np.concatenate([idle, adapter]))
    assert among == alone
    assert among.rows == 20
    assert estimate(SHARE, np.concatenate([base, idle])) == estimate(SHARE, base)
    nothing = compare(SHARE, idle, idle)
    assert (nothing.rows, nothing.verdict) == (0, "no evidence")
