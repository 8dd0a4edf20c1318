"""Paths to measures: main ones by their part, slices with dots in their values, and the nearest for a slip."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from cards import card, changed, comparison
from postil.errors import JudgeError
from postil.judging.card.model import DataUsed, Part, ScoreCard


@pytest.fixture
def full() -> ScoreCard:
    """A card with slices on target and pairs, one of them with dots in its value."""
    pairs = Part(
        data=DataUsed(name="pairs", sha256="p", rows=10),
        main="accuracy",
        measures={"accuracy": comparison(80, 70, metric="accuracy")},
        slices={"field": {"syntax": {"accuracy": comparison(80, 60, metric="accuracy")}}},
    )
    given = card(slices={"refund": 60.0, "v1.5.accuracy": 70.0})
    return changed(given, general={**given.general, "pairs": pairs})


def test_a_part_means_its_main_measure(full: ScoreCard) -> None:
    assert full.target is not None
    assert full.find("target") is full.target.measures["accuracy"]
    assert full.find("target.bleu") is full.target.measures["bleu"]
    assert full.find("general.nats") is full.general["nats"].measures["nats"]
    assert (
        full.find("general.pairs")
        is full.find("general.pairs.accuracy")
        is full.general["pairs"].measures["accuracy"]
    )


def test_slices_by_column_and_value_whatever_dots_it_has(full: ScoreCard) -> None:
    assert full.target is not None
    intent = full.target.slices["intent"]
    assert full.find("target.intent=refund") is intent["refund"]["accuracy"]
    assert full.find("target.intent=refund.bleu") is intent["refund"]["bleu"]
    assert full.find("target.intent=v1.5.accuracy") is intent["v1.5.accuracy"]["accuracy"]
    assert full.find("target.intent=v1.5.accuracy.bleu") is intent["v1.5.accuracy"]["bleu"]
    assert full.find("general.pairs.field=syntax").adapter.value == 60


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("target.blue", r"holds no measure 'target.blue' \(did you mean 'target.bleu'\?\)"),
        ("general.nat", r"\(did you mean 'general.nats'\?\)"),
        ("target.intent=refnd.accuracy", r"\(did you mean 'target.intent=refund.accuracy'\?\)"),
        ("x", r"holds no measure 'x'; it holds target, target.bleu"),
    ],
)
def test_a_slip_gets_the_nearest_path(full: ScoreCard, path: str, said: str) -> None:
    with pytest.raises(JudgeError, match=said):
        full.find(path)


def test_a_card_without_a_target_has_none(full: ScoreCard) -> None:
    with pytest.raises(JudgeError, match="no measure 'target'"):
        changed(full, target=None).find("target")
