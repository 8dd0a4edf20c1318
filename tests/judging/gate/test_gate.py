"""The gate: every condition turns both ways, only what decided is blamed, and what nobody measured never passes."""

from __future__ import annotations

import math
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))
from cards import card, changed, comparison
from postil.errors import JudgeError
from postil.judging.card.model import Contamination, Estimate
from postil.judging.gate.expression import And, Node, Not, Or, parse
from postil.judging.gate.gate import DEFAULT, MEASURED, check, refusal

ALWAYS = "target.bleu > 0"
ANSWERED = st.sampled_from([parse(f"{path} {sign} base + {offset}") for path in ("target.bleu", "general.nats")
                            for sign in ("<", ">=") for offset in (0, 30)])  # fmt: skip


def nodes() -> st.SearchStrategy[Node]:
    """Trees of and, or and not over comparisons that the card answers."""
    return st.recursive(
        ANSWERED,
        lambda part: (
            st.builds(Not, part)
            | st.builds(And, st.lists(part, min_size=2, max_size=4).map(tuple))
            | st.builds(Or, st.lists(part, min_size=2, max_size=4).map(tuple))
        ),
        max_leaves=12,
    )


# -- conditions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "passes"),
    [
        ("target.bleu > base + 5", True), ("target.bleu > base + 30", False), ("target.bleu >= base + 30", True),
        ("target.bleu < base + 30", False), ("target.bleu <= base + 30", True), ("target.bleu < 60.5", True),
        ("target.bleu > 60.5", False), ("target.bleu >= few_shot + 19", True), ("target.bleu > few_shot + 19", False),
        ("target.bleu.low > base + 28.9", True), ("target.bleu.low > base + 29.1", False),
        ("target.bleu.high < base + 31.1", True), ("target.bleu.high < base + 30.9", False),
        ("general.nats < base + 0.05", True), ("general.nats < base + 0.02", False),
        ("general.nats.high < base + 0.05", True), ("general.nats.high < base + 0.035", False),
        ("target is better", True), ("target is not better", False), ("target is worse", False),
        ("target.bleu.low > trivial + 38.9", True), ("target.bleu.low > trivial + 39.1", False),
        ("target.bleu > trivial + 39", True), ("target.bleu < trivial", False),
        ("general.nats is kept", True), ("general.nats is not kept", False), ("target is kept", True),
        ("target is not worse", True), ("general.nats is better", False), ("general.nats is worse", True),
        ("general.nats is not worse", False), ("target.bleu > live", True), ("target.bleu > live + 30", False),
    ],
)  # fmt: skip
def test_each_condition_turns_both_ways(condition: str, passes: bool) -> None:
    result = check(card(), condition)
    assert result.passed is passes
    assert [c.broke for c in result.conditions] == [not passes]
    assert check(card(), f"not ({condition})").passed is not passes


@given(nodes())
def test_logic_is_as_pythons(node: Node) -> None:
    given_card = card()

    def value(part: Node) -> bool:
        if isinstance(part, Not):
            return not value(part.part)
        if isinstance(part, And):
            return all(map(value, part.parts))
        if isinstance(part, Or):
            return any(map(value, part.parts))
        return check(given_card, str(part)).passed

    result = check(given_card, str(node))
    assert result.passed is value(node)
    assert result.passed is not any(condition.broke for condition in result.conditions)


def test_a_refusal_says_what_broke_and_by_how_much() -> None:
    result = check(card(nats=3.12), "target.bleu > base + 5 and general.nats < base + 0.05")
    assert result.sentence == "refused: general.nats 3.12 is not below base + 0.05 = 2.95"
    assert [(c.left, c.right, c.passed) for c in result.conditions] == [(60, 35, True), (3.12, 2.9 + 0.05, False)]
    close = check(card(nats=2.950001), "general.nats < base + 0.05")
    assert close.sentence == "refused: general.nats 2.950001 is not below base + 0.05 = 2.95"
    refused = check(card(), "target.bleu < 5")
    error = refusal(refused)
    assert (str(error), error.exit_code) == ("refused: target.bleu 60 is not below 5", 3)
    assert error.result is refused


def test_only_what_decided_is_blamed() -> None:
    result = check(card(), "(target.bleu > 99 or target.bleu > 50) and not general.nats > 2")
    assert [(c.passed, c.broke) for c in result.conditions] == [(False, False), (True, False), (True, True)]
    assert result.sentence == "refused: general.nats 2.93 is above 2 (the gate wants it otherwise)"
    both = check(card(), "target.bleu > 99 or target.bleu > 98")
    assert [c.broke for c in both.conditions] == [True, True]


def test_the_ends_are_those_of_the_paired_difference() -> None:
    """The two values' own intervals are three times as wide; a bound that only they would break holds."""
    assert check(card(), "general.nats.high < base + 0.045").passed
    assert check(card(), "target.bleu.low >= 58.9").passed
    assert not check(card(), "target.bleu.low >= 59.1").passed
    assert check(card(), "target.bleu.high <= 61.1").passed


def test_no_evidence_is_not_better() -> None:
    given_card = card(bleu=30.5)
    assert not check(given_card).passed
    assert "no evidence either way (these 100 rows show 1.4 or more)" in check(given_card).sentence
    assert check(given_card, "target is not worse").passed


# -- what nobody measured -------------------------------------------------------------------------------


@pytest.mark.parametrize("expression", [DEFAULT, ALWAYS, f"not not {ALWAYS}", f"not ({ALWAYS} and target.bleu < 0)"])
def test_without_general_data_nothing_passes(expression: str) -> None:
    given_card = card()
    empty = given_card.general["nats"].model_copy(update={"measures": {}})
    for general in ({}, {"nats": empty}):
        result = check(changed(given_card, general=general), expression)
        assert not result.passed
        assert result.sentence.startswith("refused: the card holds no general data")
        assert result.conditions[0].broke


@pytest.mark.parametrize(
    ("fields", "expression", "said"),
    [
        ({"target": None}, DEFAULT, "holds no target"),
        ({}, "general.pairs > base - 1", "holds no general.pairs"),
        ({}, "not general.pairs > base - 1", "holds no general.pairs"),
        ({}, f"{ALWAYS} or slices is not worse", "holds no slices"),
        ({}, "not target.accuracy > few_shot", "no few-shot value of target.accuracy"),
    ],
)
def test_a_measure_that_is_not_there_is_refused(fields: dict[str, Any], expression: str, said: str) -> None:
    result = check(changed(card(), **fields), expression)
    assert not result.passed
    assert said in result.sentence


def test_nan_and_no_rows_are_refused_under_not_too() -> None:
    given_card = card()
    for broken in (
        comparison(30, 60).model_copy(update={"adapter": Estimate(value=math.nan, low=0, high=0)}),
        comparison(30, 60).model_copy(update={"adapter": Estimate(value=math.inf, low=math.nan, high=math.nan)}),
        comparison(30, 60).model_copy(update={"base": Estimate(value=math.inf, low=0, high=0)}),
        comparison(30, 60, rows=0),
    ):
        assert given_card.target is not None
        target = given_card.target.model_copy(update={"measures": {"bleu": broken}})
        for expression in (
            "target.bleu > 5", "not target.bleu > 5", "not target is worse", "target is not worse",
            f"{ALWAYS} or {ALWAYS}",
        ):  # fmt: skip
            assert not check(changed(given_card, target=target), expression).passed
    assert not check(card(nats=math.inf)).passed


def test_an_unknown_measure_is_a_slip_not_a_refusal() -> None:
    with pytest.raises(JudgeError, match=r"column 22: .*'target.blue'.*did you mean 'target.bleu'"):
        check(card(), "target is better and target.blue > 5")
    with pytest.raises(JudgeError, match="column 1: no slice has a measure 'acuracy'; known: accuracy, bleu"):
        check(card(slices={"refund": 70}), "slices.acuracy > 5")


# -- the version in service, and slices -----------------------------------------------------------------


def test_live_is_the_version_in_service_or_the_base() -> None:
    assert not check(card(bleu=60), "target.bleu > live", live=card(bleu=61)).passed
    assert check(card(bleu=60), "target.bleu > live - 2", live=card(bleu=61)).passed
    assert "no version in service: the base" in check(card(bleu=29), "target.bleu > live").sentence
    assert check(card(), "general.nats <= live", live=card()).passed


def test_live_on_other_rows_cannot_be_compared() -> None:
    for expression in ("target.bleu > live - 50", "not target.bleu < live - 50"):
        result = check(card(), expression, live=card(data="rows-b"))
        assert not result.passed
        assert "judged on other rows (test.jsonl)" in result.sentence
    other = changed(card(), target=None)
    assert "was not judged by target.bleu" in check(card(), "target.bleu > live", live=other).sentence
    assert check(card(), DEFAULT, live=card(data="rows-b")).passed


def test_the_slice_that_broke_is_named() -> None:
    given_card = card(slices={"refund": 30, "order": 80, "greeting": 20})
    result = check(given_card)
    assert result.expression == f"{DEFAULT} and {MEASURED[0]}"
    assert result.sentence == (
        "refused: slice intent=refund: accuracy is worse than allowed: 50% → 30%, difference -20 [-25, -15], "
        "-10 points allowed, and so for 1 more of 3 slices: intent=greeting"
    )
    assert result.conditions[-1].slices == ("intent=refund", "intent=greeting")
    assert result.worse == ("intent=refund", "intent=greeting")
    assert check(given_card, ALWAYS).passed
    assert check(given_card, ALWAYS).worse == ("intent=refund", "intent=greeting")
    assert "slices that got worse: intent=refund, intent=greeting" in check(given_card, "target.bleu > 99").sentence
    assert check(card(slices={"refund": 70, "order": 80})).passed


def test_slices_are_held_against_the_version_in_service() -> None:
    live = card(slices={"refund": 90, "order": 80})
    result = check(card(slices={"refund": 70, "order": 79}), "slices.accuracy > live - 2", live=live)
    assert result.sentence == "refused: slice intent=refund: accuracy 70 is not above live - 2 = 88"
    assert result.conditions[0].slices == ("intent=refund",)
    assert result.worse == ("intent=refund",)
    assert check(card(slices={"refund": 89, "order": 79}), "slices.accuracy > live - 2", live=live).passed
    new = card(slices={"refund": 89, "chat": 79})
    assert "was not judged by slice intent=chat" in check(new, "slices > live - 2", live=live).sentence
    assert not check(live, "slices.accuracy > few_shot").passed
    assert check(live, "slices.accuracy.low > base + 24").passed
    assert check(live, "target.intent=refund is better and target.intent=refund.bleu > 50").passed


# -- for machines ---------------------------------------------------------------------------------------


def test_json_holds_plain_finite_values() -> None:
    found = check(card(nats=math.inf), DEFAULT).as_dict()
    assert found["passed"] is False
    assert [c["text"] for c in found["conditions"] if c["broke"]] == ["general.nats is kept"]
    assert found["conditions"][0]["left"] == "better"
    assert found["conditions"][1]["left"] is None
    assert found["conditions"][1]["right"] is None


def test_junit_is_read_by_an_xml_reader() -> None:
    given_card = card(slices={"a<b&\x01\ud800": 30})
    root = ET.fromstring(check(given_card, "slices is not worse and target.bleu > 5").junit("support"))
    suite = root.find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == ["slices is not worse", "target.bleu > 5"]
    failure = cases[0].find("failure")
    assert failure is not None
    assert "intent=a<b&??" in (failure.get("message") or "")
    assert cases[1].find("failure") is None


def test_a_measure_that_counted_no_row_is_refused() -> None:
    idle = comparison(0, 0, metric="refusals", rows=0)
    given = card()
    assert given.target is not None
    target = given.target.model_copy(update={"measures": given.target.measures | {"refusals": idle}})
    result = check(given.model_copy(update={"target": target}), "target.refusals is not worse and general.nats < 9")
    assert not result.passed


@pytest.mark.parametrize(
    "expression",
    [f" {DEFAULT}", DEFAULT.replace(" ", "  "), f"({DEFAULT})", "(target is better) and general is kept"],
)
def test_the_default_gate_is_itself_however_it_is_written(expression: str) -> None:
    known = changed(card(), contamination=Contamination(target=9, target_rows=9, general=0, general_rows=9))
    assert check(known, expression) == check(known)
    assert not check(known, expression).passed
