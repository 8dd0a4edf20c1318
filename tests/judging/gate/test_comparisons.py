"""The version in service: compared only by equal definitions on equal rows of one base, and row by row."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from cards import card, changed, comparison
from postil.judging.card.build import ACCURACY, Draw, hits, part_of, slices_of, stats_of
from postil.judging.card.model import DataUsed, Part, ScoreCard
from postil.judging.card.row_values import packed
from postil.judging.gate.gate import check
from postil.judging.metrics import metric_named
from postil.judging.metrics.metric import Row


def with_main(**fields: Any) -> ScoreCard:
    """The card with other fields of its main measure."""
    given = card()
    assert given.target is not None
    bleu = comparison(30, 60, **fields)
    return changed(given, target=given.target.model_copy(update={"measures": {"bleu": bleu}}))


def judged(right: list[bool], groups: list[str] | None = None, data: str = "rows-a") -> ScoreCard:
    """A card by real statistics: the base is right nowhere, the adapter where it says."""
    used = DataUsed(name="test.jsonl", sha256=data, rows=len(right))
    slices, _ = slices_of([{"group": one} for one in groups or []], ["group"], 10)
    nothing = {"accuracy": hits([False] * len(right))}
    target = part_of(used, "accuracy", {"accuracy": ACCURACY}, nothing, {"accuracy": hits(right)}, Draw(),
                     slices=slices, defined={"form": "fp32"})  # fmt: skip
    return changed(card(), target=target)


@pytest.mark.parametrize(
    ("mine", "theirs", "said"),
    [
        (
            {"definition": "a1"},
            {"definition": "b2"},
            "target.bleu is defined otherwise than for the version in service",
        ),
        ({"definition": "a1"}, {}, "cards of before have no definition"),
        ({}, {"better": "lower"}, "is defined otherwise"),
    ],
)
def test_live_compares_only_what_is_defined_alike(mine: dict[str, Any], theirs: dict[str, Any], said: str) -> None:
    for expression in ("target.bleu > live - 50", "not target.bleu < live - 50", "target.bleu.low > live - 50"):
        result = check(with_main(**mine), expression, live=with_main(**theirs))
        assert not result.passed
        assert said in result.sentence
    assert check(with_main(definition="a1"), "target.bleu > live - 50", live=with_main(definition="a1")).passed


def test_live_on_another_base_is_not_compared_and_another_form_is_another_definition() -> None:
    live = changed(card(bleu=50), base={"source": "sha256:OTHER", "form": "fp32"})
    result = check(card(), "target.bleu > live + 5", live=live)
    assert not result.passed
    assert "the version in service belongs to another base (sha256:OTHER)" in result.sentence
    assert check(card(), "target.bleu > base + 5", live=live).passed


def test_two_versions_are_held_against_each_other_row_by_row() -> None:
    """200 rows of which both get the same 100 right; the new one ten more. Their own intervals overlap widely."""
    before = judged([n % 2 == 0 for n in range(200)])
    now = judged([n % 2 == 0 or n < 20 for n in range(200)])
    m, other = now.find("target"), before.find("target")
    assert m.adapter.low < other.adapter.high
    result = check(now, "target.accuracy.low > live", live=before)
    assert result.passed
    assert "row by row 5 [" in result.sentence
    assert check(now, "target.accuracy.low > live + 1", live=before).passed
    assert not check(now, "target.accuracy.low > live + 4", live=before).passed
    assert not check(before, "target.accuracy.low > live - 2", live=now).passed
    assert check(before, "target.accuracy.high < live", live=now).passed
    assert check(now, "target.accuracy.low > live - 1", live=now).passed


def test_without_row_values_the_two_own_intervals_must_do() -> None:
    assert check(card(bleu=70), "target.bleu.low > live + 5", live=card(bleu=60)).passed  # 10 ± 3·√2
    assert not check(card(bleu=70), "target.bleu.low > live + 6", live=card(bleu=60)).passed


def test_row_values_of_other_rows_or_no_values_at_all_are_refused() -> None:
    short, long = packed(np.ones(5)), packed(np.ones(6))
    result = check(with_main(row_values=short), "target.bleu > live - 9", live=with_main(row_values=long))
    assert "target.bleu keeps the values of 5 rows, and of 6 live" in result.sentence
    result = check(with_main(row_values=short), "target.bleu > live - 9", live=with_main(row_values="nothing"))
    assert "row_values cannot be read" in result.sentence
    assert not result.passed


def test_a_corpus_measure_is_compared_row_by_row_too() -> None:
    rows: list[Row] = [{"references": [f"the cat number {i} sat on the mat today and slept"]} for i in range(60)]
    metric = metric_named("bleu")

    def by(good: int) -> ScoreCard:
        answers = [
            row["references"][0] if i < good else "the cat sat on a red mat and ran" for i, row in enumerate(rows)
        ]
        used = DataUsed(name="t", sha256="rows-a", rows=60)
        base, mine = metric.statistics(["a dog"] * 60, rows), metric.statistics(answers, rows)
        return changed(card(), target=part_of(used, "bleu", {"bleu": metric}, {"bleu": base}, {"bleu": mine}, Draw()))

    before, now = by(30), by(42)
    gap = now.find("target").adapter.value - before.find("target").adapter.value
    assert gap > 5
    result = check(now, "target.low > live", live=before)
    assert result.passed
    assert not check(now, f"target.low > live + {gap}", live=before).passed
    assert check(now, f"target.high > live + {gap}", live=before).passed


# -- slices ---------------------------------------------------------------------------------------------

GROUPS = ["a"] * 40 + ["b"] * 40
GOOD = [True] * 80
FALLEN = [True] * 40 + [n < 15 for n in range(40)]


def test_slices_are_held_against_live_on_the_same_rows_alone() -> None:
    """The new version is better than the base everywhere, and far worse than the old one on one group."""
    now, live = judged(FALLEN, GROUPS), judged(GOOD, GROUPS)
    assert check(now, "target.accuracy > 5").worse == ()
    assert check(now, "target.accuracy > 5", live=live).worse == ("group=b",)
    assert not check(now, "slices.accuracy.low > live - 10", live=live).passed
    assert check(live, "slices.accuracy.low > live - 10", live=now).passed
    elsewhere = judged(GOOD, GROUPS, data="rows-b")
    assert check(now, "target.accuracy > 5", live=elsewhere).worse == ()  # other rows tell nothing
    result = check(now, "slices.accuracy > live - 99", live=elsewhere)
    assert not result.passed
    assert "was judged on other rows (test.jsonl) than the version in service" in result.sentence


def test_small_values_pooled_otherwise_are_other_rows() -> None:
    """Also where no row's values are kept, as of any measure but the main one."""
    rows = [{"group": "abcd"[n // 15] if n < 45 else f"rare{n}"} for n in range(60)]
    used = DataUsed(name="test.jsonl", sha256="rows-a", rows=60)

    def pooled(smallest: int) -> ScoreCard:
        slices, _ = slices_of(rows, ["group"], smallest)
        found = {"accuracy": hits([True] * 60), "other": hits([True] * 60)}
        metrics = {name: replace(ACCURACY, name=name) for name in found}
        part = part_of(used, "accuracy", metrics, found, found, Draw(), slices=slices, defined={"form": "fp32"})
        return changed(card(), target=part)

    for measure in ("accuracy", "other"):
        expression = f"slices.{measure} > live - 50"
        assert check(pooled(10), expression, live=pooled(10)).passed
        result = check(pooled(16), expression, live=pooled(10))
        assert not result.passed
        assert "pools other values than that of the version in service (60 rows, and 15 live)" in result.sentence


def test_a_general_part_on_other_rows_is_not_compared_either() -> None:
    def with_text(digest: str, value: float) -> ScoreCard:
        stats = {"accuracy": stats_of([(value, 1)] * 200)}
        used = DataUsed(name="mmlu", sha256=digest, rows=200)
        part: Part = part_of(used, "accuracy", {"accuracy": ACCURACY}, stats,
                             stats, Draw(), slices={"subject": {"law": np.arange(100)}})  # fmt: skip
        given = card()
        return changed(given, general={**given.general, "choices": part})

    now, live, other = with_text("m", 50), with_text("m", 60), with_text("n", 60)
    assert not check(now, "general.choices > live - 5", live=live).passed
    assert check(now, "general.choices > live - 15", live=live).passed
    assert check(now, "target.bleu > 5", live=live).worse == ("general.choices.subject=law",)
    assert check(now, "target.bleu > 5", live=other).worse == ()
    assert "judged on other rows (mmlu)" in check(now, "general.choices > live - 15", live=other).sentence


def test_an_own_measure_called_as_an_end_is_a_measure() -> None:
    own = {name: comparison(1, 2, metric=name, half=0.1) for name in ("own.low", "own.score")}
    given = card()
    assert given.target is not None
    measures = {**given.target.measures, **own}
    given = changed(given, target=given.target.model_copy(update={"measures": measures}))
    assert check(given, "target.own.low > 1.95").passed
    assert check(given, "target.own.score.low > 1.85 and target.own.low.low > 1.85").passed
    assert check(given, "target.own.score is not worse").passed
    assert str(check(given, "target.own.low > 1").conditions[0].text) == "target.own.low > 1"
