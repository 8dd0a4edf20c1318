"""The card's model: a card that contradicts itself is no card, and the cards of before still load."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from cards import card, comparison
from postil.errors import JudgeError
from postil.judging.card.file import read_card
from postil.judging.card.model import Comparison, Estimate, Leakage, ScoreCard

NEW = ("corrected", "definition", "row_values")  # of a measure, since format 1 was first written


def edited(**changes: Any) -> dict[str, Any]:
    """A measure 30 → 60 as in a file, some of its fields changed by hand."""
    whole = json.loads(comparison(30, 60).model_dump_json())
    for key, value in changes.items():
        place = whole
        *path, last = key.split("__")
        for one in path:
            place = place[one]
        place[last] = value
    return dict(whole)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"difference": {"value": -29, "low": -30, "high": -28}}, "the difference -29 is not adapter less base"),
        ({"verdict": "no evidence"}, "the verdict is 'no evidence', and its interval says 'better'"),
        ({"difference__low": -1}, "its interval says 'no evidence'"),
        ({"verdict": "worse"}, "its interval says 'better'"),
        ({"better": "lower"}, "its interval says 'worse'"),
        ({"difference__low": 31}, r"30 lies outside its own interval \[31, 31\]"),
        ({"adapter__high": 59}, r"60 lies outside its own interval \[57, 59\]"),
        ({"base__value": 20, "base__low": 19}, "is not adapter less base"),
        ({"corrected": {"value": 30, "low": -1, "high": 61}}, "its interval says 'no evidence'"),
        ({"corrected": {"value": 2, "low": 1, "high": 3}}, "the difference 2 is not adapter less base"),
    ],
)  # fmt: skip
def test_a_measure_edited_by_hand_is_no_measure(changes: dict[str, Any], said: str) -> None:
    assert Comparison.parse(edited())
    with pytest.raises(JudgeError, match=said):
        Comparison.parse(edited(**changes))


def test_a_card_edited_by_hand_is_refused_with_its_file_and_field(tmp_path: Path) -> None:
    whole = card(bleu=1).model_dump(mode="json")
    whole["target"]["measures"]["bleu"]["verdict"] = "better"  # with a difference of -29
    (tmp_path / "postil.json").write_text(json.dumps({"format": 1, "card": {"score_card": whole}}))
    with pytest.raises(
        JudgeError, match=r"postil.json: .*target: .*measures.bleu: .*its interval says 'worse'.*judge"
    ):
        read_card(tmp_path)


def test_what_leaked_lies_in_its_interval() -> None:
    fine = Estimate(value=0, low=0, high=2)
    with pytest.raises(JudgeError, match="0 lies outside its own interval"):
        Leakage(rows=9, prefix_tokens=8, matched_tokens=16, base=fine,
                adapter=Estimate(value=0, low=90, high=95))  # fmt: skip


def test_rounding_and_what_is_not_finite_contradict_nothing() -> None:
    assert Estimate(value=2.0, low=2.0000000001, high=2.1)
    assert Estimate(value=math.nan, low=0, high=0)
    assert comparison(30, math.inf, metric="nats", better="lower").verdict == "worse"


def test_cards_of_before_still_load() -> None:
    """Without definitions, row values, baselines and contamination; slices corrected in their one interval."""
    whole = card(slices={"refund": 70}).model_dump(mode="json")
    for key in ("contamination", "scope", "chat_template"):
        del whole[key]
    for part in (whole["target"], *whole["general"].values()):
        del part["baselines"]
        for measures in (part["measures"], *(one for values in part["slices"].values() for one in values.values())):
            for measure in measures.values():
                for key in NEW:
                    del measure[key]
    whole["target"]["slices"]["intent"]["refund"]["accuracy"]["level"] = 0.99
    old = ScoreCard.parse(whole)
    assert old.contamination is None
    assert old.chat_template is None
    assert old.find("target").definition == ""
    assert old.find("target.intent=refund").verdict == "better"


def test_harm_shows_in_the_plain_interval_and_a_gain_in_the_corrected_one() -> None:
    wide = Estimate(value=-10, low=-25, high=5)
    assert comparison(50, 40, half=2, corrected=wide, verdict="worse").shown == "worse"
    wide = Estimate(value=10, low=-5, high=25)
    assert comparison(50, 60, half=2, corrected=wide, verdict="no evidence").shown == "no evidence"
    assert comparison(50, 60, half=2).gain == (8, 12)
    assert comparison(3.0, 2.0, metric="nats", better="lower", half=0.5).gain == (0.5, 1.5)
