"""Two judgings held against each other by the gate: the same in every respect, or not compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postil.adapter import Adapter
from postil.base import Base
from postil.judging.card.model import ScoreCard
from postil.judging.card.row_values import unpacked
from postil.judging.gate.gate import check
from postil.judging.gate.items import sides
from postil.judging.judge import judge
from postil.judging.options import JudgeOptions

TEXT = [{"text": f"Line {n} of some text that nobody has learned, {n * n} times over."} for n in range(12)]
CHOICES = [{"context": f"Is {n} even?", "choices": ["yes", "no"], "answer": n % 2} for n in range(8)]
LETTERS = "def letters(answer, row):\n    return float(len(answer)) * {factor}\n"


@pytest.fixture
def card_of(
    base: Base, taught: Adapter, rows: Callable[[int, int], list[dict[str, Any]]]
) -> Callable[..., ScoreCard]:
    """card_of(options…): the card of `taught` on the same rows."""

    def run(**more: Any) -> ScoreCard:
        options = {"general": {"window": 32}, "metrics": ("exact_match",), "resamples": 100} | more
        return judge(base, taught, target=rows(40, 52), general=TEXT, chat=None, choices=CHOICES, keep=False,
                     options=JudgeOptions(**options))  # fmt: skip

    return run


def test_a_card_tells_what_defines_its_measures_and_keeps_the_main_ones_rows(
    card_of: Callable[..., ScoreCard],
) -> None:
    card = card_of(slices=("group",), smallest_slice=6)
    measures = [m for _, _, part in sides(card) for m in part.measures.values()]
    assert all(len(m.definition) == 16 for m in measures)
    assert len({card.find(path).definition for path in ("target", "target.nats", "general.nats", "general.kl")}) == 4
    assert unpacked(card.find("target").row_values).tolist() == [100.0] * 12
    assert unpacked(card.find("target.group=a").row_values).tolist() == [100.0] * 6
    assert card.find("target.nats").row_values == ""
    nats = card.find("general.nats")
    values = unpacked(nats.row_values)
    assert len(values) == nats.rows
    assert values.mean() == pytest.approx(nats.adapter.value, abs=0.05)
    assert card.chat_template is True
    assert ScoreCard.parse(card.model_dump(mode="json")) == card


def test_only_what_was_asked_alike_is_compared(card_of: Callable[..., ScoreCard], tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text(LETTERS.format(factor=1))
    metrics = ("exact_match", f"{own}:letters")
    card = card_of(metrics=metrics)
    asked = {"target": "target.exact_match.low >= live", "own": "target.own.letters >= live",
             "choices": "general.choices >= live", "nats": "general.nats.high <= live"}  # fmt: skip

    def refused(live: ScoreCard) -> set[str]:
        """The measures that cannot be compared with this live card's."""
        found = {name: check(card, f"{text} and general.nats > 0", live=live) for name, text in asked.items()}
        assert all(one.passed or "is defined otherwise than for the version in service" in one.sentence
                   for one in found.values())  # fmt: skip
        return {name for name, one in found.items() if not one.passed}

    assert refused(card_of(metrics=metrics)) == set()
    assert refused(card_of(metrics=metrics, max_new_tokens=3)) == {"target", "own"}
    assert refused(card_of(metrics=metrics, stop=("!",))) == {"target", "own"}
    first_line = {"exact_match": {"first_line": True}}
    assert refused(card_of(metrics=metrics, metric_options=first_line)) == {"target"}
    assert refused(card_of(metrics=metrics, general={"window": 32, "prompt": "Q: {context}\nA:"})) >= {"choices"}
    own.write_text(LETTERS.format(factor=2))
    assert refused(card_of(metrics=metrics)) == {"own"}
