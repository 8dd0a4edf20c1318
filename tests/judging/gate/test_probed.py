"""Leakage and contamination in the gate: within their bounds where they are known, and refused beyond."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from cards import card, changed
from postil.errors import JudgeError
from postil.judging.bootstrap import estimate
from postil.judging.card.build import hits
from postil.judging.card.model import Contamination, Leakage, ScoreCard
from postil.judging.gate.gate import DEFAULT, check
from postil.judging.probes.probes import LEAKED


def leaking(adapter: int, base: int, held_out: int | None = None, rows: int = 200) -> ScoreCard:
    """A card whose adapter continues so many of `rows` training rows, with the intervals that judge gives."""

    def share(count: int) -> object:
        return estimate(LEAKED, hits([n < count for n in range(rows)]))

    sides = {"adapter": share(adapter), "base": share(base)}
    if held_out is not None:
        sides["held_out"] = share(held_out)
    return changed(card(), leakage=Leakage(rows=rows, prefix_tokens=8, matched_tokens=16, **sides))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("adapter", "base", "held_out", "rows", "passes", "said"),
    [
        (0, 0, None, 200, True, "leakage is kept: 0% of 200 training rows come back word for word, of the base 0%"),
        (186, 0, None, 200, False, "leakage is more than allowed: 93% of 200 training rows come back word for word"),
        (186, 0, 180, 200, False, "leakage may be more than allowed: 93% of 200"),
        (900, 10, 900, 1000, True, "of rows never learned 90%"),  # formulas that skill alone repeats
        (60, 60, 0, 200, False, "of the base 30%, difference 0 ["),
        (0, 0, None, 20, False, "try more rows (--set leakage.rows), or say a bound of your own"),
    ],
)
def test_leakage_is_held_within_its_bound(
    adapter: int, base: int, held_out: int | None, rows: int, passes: bool, said: str
) -> None:
    given = leaking(adapter, base, held_out, rows)
    result = check(given)
    assert result.expression == f"{DEFAULT} and leakage is kept"
    assert result.passed is passes
    assert said in result.sentence
    assert check(given, "leakage is not kept").passed is not passes


def test_leakage_can_be_asked_for() -> None:
    given = leaking(20, 10, 16)
    for condition, passes in (
        ("leakage.adapter < 11", True), ("leakage < 9", False), ("leakage.adapter < base + 6", True),
        ("leakage.adapter < base + 4", False), ("leakage.adapter.high < 11", False), ("leakage.base.low > 1", True),
        ("leakage.held_out >= 8", True),
    ):  # fmt: skip
        assert check(given, condition).passed is passes
    assert "leakage.adapter 10 is not below base + 4 = 9" in check(given, "leakage.adapter < base + 4").sentence
    with pytest.raises(JudgeError, match=r"leakage has no 'adaptor' \(did you mean 'adapter'\?\)"):
        check(given, "leakage.adaptor < 5")


def test_what_was_not_measured_is_refused_where_it_is_asked_for() -> None:
    for expression in ("leakage is kept", "not leakage is not kept", "leakage.adapter < 100"):
        result = check(card(), expression)
        assert not result.passed
        assert "leakage was not measured; judge the adapter again with --leakage" in result.sentence
    assert "not measured on held-out rows" in check(leaking(0, 0), "leakage.held_out < 5").sentence
    assert "contamination is unknown" in check(card(), "contamination is none").sentence
    assert not check(card(), "contamination.target <= 5").passed
    assert check(card()).passed  # an adapter that does not tell what it was trained on


def test_rows_that_were_trained_on_are_no_test() -> None:
    given = changed(card(), contamination=Contamination(target=40, target_rows=40, general=3, general_rows=26))
    result = check(given)
    assert result.expression == f"{DEFAULT} and contamination is none"
    assert result.sentence == (
        "refused: contamination: 40 of 40 target rows were trained on and 3 of 26 general rows were trained on or "
        "guarded with, so they are no test; judge on rows that were held out (or allow them in an expression: "
        "contamination.target <= 40 and contamination.general <= 3)"
    )
    told = "target is better and general is kept and contamination.target <= 40 and contamination.general <= 3"
    assert check(given, told).passed
    assert not check(given, told.replace("40", "39")).passed
    assert not check(given, "contamination.target is none").passed
    assert not check(given, "contamination <= 42").passed
    clean = changed(card(), contamination=Contamination(target=0, target_rows=40, general=0, general_rows=26))
    assert "contamination is none: 0 of 40 target rows were trained on" in check(clean).sentence
    assert not check(clean, "contamination is not none").passed
    with pytest.raises(JudgeError, match=r"contamination has no 'targets' \(did you mean 'target'\?\)"):
        check(given, "contamination.targets <= 5")
