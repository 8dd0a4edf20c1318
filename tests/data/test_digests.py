"""Digests of rows: equal for equal words in any shape, passages that survive another cut, sets within a bound."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from postil.data import DataOptions, load_data
from postil.data.digests import DigestSet, asked_digest, passages, row_digests, seen_of
from postil.data.formats import Chat, Pair, Text
from postil.errors import DataError


def chat(*turns: str, system: str = "") -> Chat:
    roles = ("user", "assistant")
    said = [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]
    return Chat([{"role": "system", "content": system}, *said] if system else said, None)


def test_the_same_words_are_the_same_row_in_every_shape() -> None:
    wanted = row_digests(Pair("How far  is it?\n", "Two miles.", ""))
    for other in (
        Pair("How far is it?", " Two miles.", "Be brief."),
        chat("How far is it?", "Two miles."),
        chat("How far is\tit?", "Two  miles.", system="Be kind."),
        Pair("How far is it?", "Two miles.", ""),
    ):
        assert row_digests(other) == wanted
    assert len(wanted.prompts) == len(wanted.answers) == 1
    composed, apart = Pair("caf\u00e9", "x", ""), Pair("cafe\u0301", "x", "")
    assert row_digests(composed) == row_digests(apart)


@pytest.mark.parametrize(
    "other",
    [
        Pair("How far is it", "Two miles.", ""),
        Pair("how far is it?", "Two miles.", ""),
        chat("How far is it?", "A.", "B?", "C."),
    ],
)  # fmt: skip
def test_other_words_are_another_row(other: Chat | Pair) -> None:
    wanted = row_digests(Pair("How far is it?", "Two miles.", ""))
    assert set(row_digests(other).answers).isdisjoint(wanted.answers)


def test_another_answer_to_the_same_question_differs_in_the_answer_alone() -> None:
    one, other = (row_digests(Pair("How far?", text, "")) for text in ("Two.", "Three."))
    assert one.prompts == other.prompts
    assert set(one.answers).isdisjoint(other.answers)


def test_every_answer_of_a_conversation_is_one_that_a_row_of_its_own_would_be() -> None:
    whole = row_digests(chat("a?", "b.", "c?", "d."))
    for place, part in enumerate((chat("a?", "b."), chat("a?", "b.", "c?", "d."))):
        assert row_digests(part).prompts[-1] == whole.prompts[place]
        assert row_digests(part).answers[-1] == whole.answers[place]
    assert asked_digest(chat("a?", "b.", "c?").messages) == whole.prompts[1]
    assert row_digests(chat("a? b.", "c? d.")).prompts[0] not in whole.prompts  # words do not move between turns


def test_tool_calls_are_part_of_what_was_said() -> None:
    def call(city: str) -> Chat:
        calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}]
        return Chat(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}], None
        )

    assert row_digests(call("Rome")).prompts == row_digests(call("Oslo")).prompts
    assert row_digests(call("Rome")).answers != row_digests(call("Oslo")).answers


def test_a_row_that_asks_nothing_is_known_by_its_answer_alone() -> None:
    empty = row_digests(Pair("  ", "A tale.", ""))
    assert empty.prompts == ()
    assert empty.answers == row_digests(Text("A  tale.")).answers
    assert asked_digest([{"role": "system", "content": "Be kind."}]) is None


def story(seed: int, count: int) -> list[str]:
    drawn = random.Random(seed)
    return ["".join(drawn.choices("abcdefghijklmnop", k=drawn.randint(2, 8))) for _ in range(count)]


def test_passages_are_found_again_in_another_cut() -> None:
    words = story(0, 4000)
    whole = set(passages(" ".join(words)))
    assert 180 < len(whole) < 320  # one in sixteen of 3,993
    window = set(passages("\n".join(word.upper() + "," for word in words[1337:1737])))
    assert len(window) > 10
    assert window <= whole
    assert whole.isdisjoint(passages(" ".join(story(1, 4000))))
    assert passages("seven words are too few for one") == []
    changed = [*words[:2000], "other", *words[2001:]]
    assert len(whole & set(passages(" ".join(changed)))) >= len(whole) - 8


def test_scripts_without_blanks_have_passages_too() -> None:
    letters = [chr(0x4E00 + random.Random(n).randint(0, 3000)) for n in range(600)]
    whole = set(passages("".join(letters)))
    assert len(whole) > 20
    assert set(passages("".join(letters[100:500]))) <= whole


def test_a_set_of_digests_reads_back_and_is_bounded() -> None:
    values = [int(one) for one in np.random.default_rng(0).integers(0, 2**63, 1000)] + [2**64 - 1]
    found = DigestSet.of([*values, *values])
    kept = DigestSet.parse(json.loads(json.dumps(found.as_dict())))
    assert (len(kept.kept), kept.below) == (1001, None)
    assert all(one in kept and kept.tells(one) for one in values)
    assert 5 not in kept
    assert DigestSet.of([]).as_dict() == {"digests": "", "below": None}
    assert 0 not in DigestSet.of([])
    few = DigestSet.of(values, most=100)
    assert len(few.kept) == 100
    assert few.below == sorted(values)[100]
    assert sum(few.tells(one) for one in values) == 100
    assert all(one in few for one in values if few.tells(one))
    again = DigestSet.parse(few.as_dict())
    assert (again.below, again.kept.tolist()) == (few.below, few.kept.tolist())
    both = few | DigestSet.of([1, 2, 2**63 - 1])
    assert both.below == few.below  # what is above was not known of the first
    assert (1 in both, 2**63 - 1 in both, both.tells(2**63 - 1)) == (True, False, False)


@pytest.mark.parametrize("value", [{}, {"digests": "%%%", "below": None}, {"digests": "AAAA", "below": None}, []])
def test_digests_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(DataError, match="digests of rows cannot be read"):
        DigestSet.parse(value)


def test_loaded_rows_carry_their_digests(chatml: Any) -> None:
    rows = [{"question": "one?", "reply": "eins"}, {"question": "two?", "reply": "zwei"}]
    options = DataOptions(columns={"prompt": "question", "completion": "reply"})
    data = load_data(rows, chatml, options)
    assert data.digests == {n: row_digests(Pair(row["question"], row["reply"], "")) for n, row in enumerate(rows, 1)}
    seen = seen_of(data.digests.values())
    assert {kind: len(found.kept) for kind, found in seen.items()} == {"prompts": 2, "answers": 2, "passages": 0}
