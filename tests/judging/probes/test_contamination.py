"""Contamination: rows judged on that the training saw, in whatever shape and cut, counted from the adapter's card."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from postil.base import Base
from postil.data import DataOptions
from postil.data.digests import RowDigests, Seen, row_digests, seen_of
from postil.data.formats import Pair, Text, detect, read_row
from postil.errors import JudgeError
from postil.judging.probes.contamination import UNKNOWN, contamination_of
from postil.judging.sets.target import Item, read_target
from postil.training.card import rows_seen

RAW = DataOptions(format="raw")
Rows = list[dict[str, Any]]


def seen(rows: Rows) -> Seen:
    return seen_of(row_digests(read_row(row, detect(row, DataOptions()))) for row in rows)


def card(trained: Rows, held_out: Rows = [], general: Rows = [], earlier: Any = None) -> dict[str, Any]:  # noqa: B006
    told = rows_seen(seen(trained), seen(held_out), seen(general), earlier)
    return {"seen": json.loads(json.dumps(told))}


def questions(rows: Rows, base: Base, options: DataOptions = RAW) -> tuple[Item, ...]:
    return read_target(rows, base, options).items


def pairs(first: int, end: int, answer: str = "yes") -> Rows:
    return [{"prompt": f"Say {n}", "completion": answer} for n in range(first, end)]


def test_the_training_file_itself(base: Base) -> None:
    found, notes = contamination_of(card(pairs(0, 40)), questions(pairs(0, 40), base), [])
    assert found is not None
    assert (found.target, found.target_rows, found.target_answers, found.target_held_out) == (40, 40, 40, 0)
    assert (found.general, found.general_rows) == (0, 0)
    assert len(notes) == 1
    assert "40 of 40 questions of the target are of the training (40 of them with the answer)" in notes[0]


def test_rows_that_it_never_saw(base: Base) -> None:
    general = [{"text": "Nobody has learned this line of text."}]
    found, notes = contamination_of(card(pairs(0, 40)), questions(pairs(40, 50), base), general)
    assert found is not None
    assert (found.target, found.target_rows, found.general, found.general_rows) == (0, 10, 0, 1)
    assert notes == []


def test_a_question_is_known_with_another_answer_and_in_another_shape(base: Base) -> None:
    chats = [
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f" Say  {n}"},
                      {"role": "assistant", "content": "no"}, {"role": "user", "content": "Sure?"},
                      {"role": "assistant", "content": "yes"}]}
        for n in range(5)
    ]  # fmt: skip
    found, notes = contamination_of(card(chats), questions(pairs(0, 8), base), [])
    assert found is not None
    assert (found.target, found.target_rows, found.target_answers) == (5, 8, 0)
    assert "5 of 8 questions of the target are of the training;" in notes[0]
    found, _ = contamination_of(card(pairs(0, 8)), questions(chats, base, DataOptions()), [])
    assert found is not None
    assert found.target == 0  # its last turn is another question
    found, _ = contamination_of(card(pairs(0, 8, "no")), questions([
        {"messages": chat["messages"][:3]} for chat in chats], base, DataOptions()), [])  # fmt: skip
    assert found is not None
    assert (found.target, found.target_answers) == (5, 5)


def test_any_of_several_references_may_have_been_learned(base: Base) -> None:
    rows = [{"prompt": "Say", "references": ["no", "yes"]}]
    found, _ = contamination_of(card([{"prompt": "Say", "completion": "yes"}]), questions(rows, base), [])
    assert found is not None
    assert (found.target, found.target_answers) == (1, 1)


def test_rows_held_out_to_choose_the_state_count_and_are_told_apart(base: Base) -> None:
    found, notes = contamination_of(card(pairs(0, 6), pairs(4, 10)), questions(pairs(0, 20), base), [])
    assert found is not None
    assert (found.target, found.target_held_out, found.target_answers) == (10, 4, 6)
    assert "(6 of them with the answer, 4 held out to choose its state by)" in notes[0]


def test_rows_that_ask_nothing_are_known_by_their_answers(base: Base) -> None:
    empty = [{"prompt": "", "completion": f"tale {n}"} for n in range(6)]
    options = DataOptions(format="raw")
    found, _ = contamination_of(
        card(empty[:3]), questions([{"prompt": "", "completion": "tale 1"}], base, options), []
    )
    assert found is not None
    assert (found.target, found.target_rows) == (1, 1)
    found, _ = contamination_of(
        card(empty[:3]), questions([{"prompt": "", "completion": "tale 5"}], base, options), []
    )
    assert found is not None
    assert (found.target, found.target_rows) == (0, 1)


def words(seed: int, count: int) -> str:
    drawn = random.Random(seed)
    return " ".join("".join(drawn.choices("abcdefghijklmnop", k=drawn.randint(2, 8))) for _ in range(count))


def test_general_text_is_found_in_another_cut() -> None:
    long, other = words(0, 3000), words(1, 3000)
    parts = long.split()
    rows = [
        {"text": long},
        {"text": " ".join(parts[500:900])},  # a part of it
        {"text": "New here: " + "\n".join(parts[100:700])},
        {"text": " ".join(parts[:300] + other.split()[:900])},  # a quarter of it
        {"text": other},
        {"text": "Short."},
    ]
    found, notes = contamination_of(card(pairs(0, 2), [], [{"text": long}, {"text": "Short. "}]), (), rows)
    assert found is not None
    assert (found.general, found.general_rows) == (4, 6)
    assert "4 of 6 general rows were trained on or guarded with" in notes[0]
    found, _ = contamination_of(card([{"text": long}]), (), rows[:2])
    assert found is not None
    assert found.general == 2


@pytest.mark.parametrize(
    ("row", "known"),
    [
        ({"text": "A line."}, True),
        ({"good": "A line.", "bad": "Line a."}, True),
        ({"sentence_good": "A line.", "sentence_bad": "Line a."}, True),
        ({"good": "Line a.", "bad": "A line."}, False),
        ({"prompt": "What is the capital?"}, True),
        ({"prompt": "What is the river?"}, False),
        ({"messages": [{"role": "user", "content": "What is the capital?"}]}, True),
        ({"messages": [{"role": "user", "content": "What?"}]}, False),
        ({"prompt": "What is the capital?", "completion": "Rome"}, True),
        ({"context": "What is the capital?", "choices": ["a", "b"], "answer": 0}, True),
        ({"context": "the capital", "choices": ["a", "b"], "answer": 0}, True),  # as the judging's prompt shows it
        ({"context": "the river", "choices": ["a", "b"], "answer": 0}, False),
    ],
)
def test_general_rows_of_every_shape(row: dict[str, Any], known: bool) -> None:
    general = [{"text": "A line."}]
    asked = [{"prompt": "What is the capital?", "completion": "Oslo"}]
    found, _ = contamination_of(card(asked, [], general), (), [row], "What is {context}?")
    assert found is not None
    assert (found.general, found.general_rows) == (int(known), 1)


def test_a_target_of_running_text(base: Base) -> None:
    rows = [{"text": words(n, 60)} for n in range(4)]
    found, _ = contamination_of(card(rows[:3]), questions(rows, base, DataOptions(format="text")), [])
    assert found is not None
    assert (found.target, found.target_rows) == (3, 4)


@pytest.mark.parametrize("told", [{}, {"seen": None}, {"recipe": {}}, {"seen": {"complete": False, "trained": None}}])
def test_where_nothing_is_known_that_is_said(told: dict[str, Any], base: Base) -> None:
    assert contamination_of(told, questions(pairs(0, 4), base), []) == (None, [UNKNOWN])


def test_what_is_known_in_part_says_so(base: Base) -> None:
    told = {"seen": rows_seen(seen(pairs(0, 2)), seen([]), None, None)}
    found, notes = contamination_of(told, questions(pairs(0, 4), base), [])
    assert found is not None
    assert found.target == 2
    assert "rows that came to the training as samples" in notes[0]
    assert told["seen"]["complete"] is False
    onward = card(pairs(2, 4), earlier=card(pairs(0, 2))["seen"])
    assert onward["seen"]["complete"] is True
    found, _ = contamination_of(onward, questions(pairs(0, 8), base), [])
    assert found is not None
    assert found.target == 4  # those of the training before, too
    assert rows_seen(seen([]), seen([]), seen([]), {})["complete"] is False


def test_of_a_huge_training_set_a_fair_part_is_looked_up(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("postil.data.digests.MOST", 500)
    many = seen_of(
        [*(row_digests(Pair(f"Say {n}", "yes", "")) for n in range(1000)), row_digests(Text(words(0, 100)))]
    )
    small = {kind: type(found).of((int(one) for one in found.kept), most=500) for kind, found in many.items()}
    told = {"seen": rows_seen(small, seen([]), seen([]), None)}
    found, notes = contamination_of(told, questions(pairs(900, 1100), base), [])
    assert found is not None
    assert 60 < found.target_rows < 140
    assert 25 < found.target < found.target_rows
    assert f"{200 - found.target_rows} rows could not be looked up" in notes[0]


@pytest.mark.parametrize("spoilt", [3, {"prompts": {"digests": "%", "below": None}}, {"prompts": 7}])
def test_a_spoilt_card_is_one_sentence(spoilt: Any, base: Base) -> None:
    with pytest.raises(JudgeError, match="the adapter's card: `seen` cannot be read"):
        contamination_of({"seen": {"trained": spoilt}}, questions(pairs(0, 1), base), [])


def test_a_row_of_no_digests_is_not_looked_up() -> None:
    assert seen_of([RowDigests()])["prompts"].as_dict() == {"digests": "", "below": None}
    found, _ = contamination_of(card(pairs(0, 2)), (), [{"messages": [{"role": "system", "content": "Be kind."}]}])
    assert found is not None
    assert found.general_rows == 0


def test_blank_documents_say_nothing_and_are_not_among_what_could_not_be_looked_up() -> None:
    found, notes = contamination_of(card([{"text": "A line."}]), (), [{"text": " \n"}, {"text": "A line."}])
    assert found is not None
    assert (found.general, found.general_rows) == (1, 1)
    assert not any("could not be looked up" in note for note in notes)
