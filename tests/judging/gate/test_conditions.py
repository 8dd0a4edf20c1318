"""Slips in a gate's expression are found before the work, by what the card will hold."""

from __future__ import annotations

import pytest

from postil.errors import JudgeError
from postil.judging.gate.conditions import check_measures
from postil.judging.gate.gate import DEFAULT, MEASURED

TARGET = ["accuracy", "own.low", "nats"]
GENERAL = {"nats": ["nats"], "chat": ["nats", "same_start"], "choices": ["accuracy"]}


@pytest.mark.parametrize(
    "expression",
    [
        DEFAULT, *MEASURED, "target.own.low > 1", "target.own.low.high > 1", "slices.own.low is kept",
        "general.chat.same_start.low > base - 30", "slices.same_start is kept", "leakage.held_out < 5",
        "contamination.general <= 3", "general.choices.subject=law.accuracy > 5", "general.pairs is kept",
    ],
)  # fmt: skip
def test_what_the_card_may_hold_is_let_through(expression: str) -> None:
    check_measures(expression, TARGET, GENERAL)
    if not expression.startswith("slices.own"):  # of the target's answers, which there are none of then
        check_measures(expression, None, GENERAL)


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("target is better and target.acuracy > 5", r"column 22: .*'target.acuracy' .did you mean 'target.accuracy'"),
        ("general.chat.same_strat is kept", r"did you mean 'general.chat.same_start'"),
        ("slices.bleu is kept", "will hold no measure 'slices.bleu'"),
        ("leakage.adaptor < 5", r"did you mean 'leakage.adapter'"),
        ("contamination.targets <= 5", r"did you mean 'contamination.target'"),
        ("general.arc_easy > base", "will hold no measure 'general.arc_easy'"),
    ],
)
def test_a_slip_is_named_with_its_column(expression: str, said: str) -> None:
    with pytest.raises(JudgeError, match=said):
        check_measures(expression, TARGET, GENERAL)
