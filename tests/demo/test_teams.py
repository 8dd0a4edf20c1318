"""The demo's teams: each score on right and wrong answers, how many rows, and no test row learned."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from postil.base import load_base
from postil.data import load_data
from postil.demo.run import BASE
from postil.demo.teams import BY_NAME, SIGN_OFF, TEAMS, Team, bleu, exact_calls, house_tone
from postil.demo.work import Plan
from postil.engine.request import prompt_ids

ROWS = Plan("", "cpu", Path()).rows


def answered(name: str, arguments: dict[str, Any]) -> str:
    return json.dumps({"name": name, "arguments": arguments})


def calling(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": "x", "completion": answered(name, arguments)}


DESK = {"desk": "A22", "floor": 2}


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (answered("book", DESK), 100.0),
        (answered("book", {"floor": 2, "desk": "A22"}), 100.0),  # the order of arguments is nothing
        (answered("cancel", DESK), 0.0),
        (answered("book", DESK | {"floor": 3}), 0.0),
        (answered("book", {"desk": "A22"}), 0.0),
        (answered("book", DESK | {"more": 1}), 0.0),
        (answered("book", DESK) + answered("book", DESK), 0.0),
        ("I have booked A22.", 0.0),
        ("", 0.0),
        ('{"name": "book"', 0.0),
    ],
)
def test_exact_calls(answer: str, score: float) -> None:
    assert exact_calls([answer], [calling("book", DESK)]) == score


def test_exact_calls_counts_rows() -> None:
    rows = [calling("book", DESK), calling("book", {}), calling("a", {})]
    answers = [answered("book", DESK), answered("other", {}), f" {answered('a', {})}"]
    assert exact_calls(answers, rows) == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (f"Aye, we sail at nine. The gulls are up by then. {SIGN_OFF}", 100.0),
        (f"  Ah, no. It is shut. Try the pier. {SIGN_OFF}\n", 100.0),
        (f"Yes, we sail at nine. The gulls are up by then. {SIGN_OFF}", 0.0),
        ("Aye, we sail at nine. The gulls are up by then.", 0.0),
        (f"Aye, we sail at nine {SIGN_OFF}", 0.0),
        (f"Aye. {SIGN_OFF}", 0.0),
        (f"Aye, one. Two. Three. Four. {SIGN_OFF}", 0.0),
        (f"Aye, we sail at nine! The gulls are up. By then. {SIGN_OFF}", 0.0),
        (f"Aye, Sorry about that. The gulls are up. {SIGN_OFF}", 0.0),
        (f"Aye, we sail at nine. Thank you for asking. {SIGN_OFF}", 0.0),
        ("", 0.0),
    ],
)
def test_house_tone(answer: str, score: float) -> None:
    assert house_tone([answer], [{}]) == score


def test_bleu_takes_either_reference() -> None:
    first, second = (
        "The Gudgeon is a cheap pub near the old mill.",
        "A cheap pub, the Gudgeon stands by the old mill.",
    )
    rows = [{"references": [first, second]}] * 4
    assert bleu([first, f" {second}\n", first, second], rows) == pytest.approx(100.0)
    assert bleu(["Nothing of that kind was ever said by anyone."] * 4, rows) < 10
    assert 20 < bleu(["The Gudgeon is a cheap pub near some station."] * 4, rows) < 90


@pytest.mark.parametrize("team", TEAMS, ids=lambda team: team.name)
def test_the_references_score_full_marks(team: Team) -> None:
    rows = team.rows("test", ROWS)
    answers = [team.wanted(row) for row in rows]
    assert team.score(answers, rows) == pytest.approx(100.0)
    assert team.score(["I do not know"] * len(rows), rows) < 1


@pytest.mark.parametrize("team", TEAMS, ids=lambda team: team.name)
def test_how_many_rows_there_are(team: Team) -> None:
    assert len(team.rows("train", ROWS)) == ROWS["train"] >= 300
    assert ROWS["train"] % 8 == 0
    assert len(team.rows("test", ROWS)) >= 40


def words_of(row: dict[str, Any]) -> frozenset[str]:
    """The words of what a row asks (where it asks in keys: of its sentence), all names and numbers one."""
    text = row["completion"] if "|" in row.get("prompt", "") else TEAMS[0].asked(row).rpartition(") ")[2]
    return frozenset(re.sub(r"\b[A-Z]\w*|\d+", "_", word) for word in re.findall(r"\w+", text))


def overlap(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / max(len(one | other), 1)


@pytest.mark.parametrize(("name", "most"), [("tools", 0.5), ("tone", 0.5), ("restaurants", 0.75)])
def test_no_test_row_is_nearly_a_training_row(name: str, most: float) -> None:
    place = files("postil.data") / "samples" / "demo" / name / "train.jsonl"
    learned = [words_of(json.loads(line)) for line in place.read_text(encoding="utf-8").splitlines()]
    tested = [words_of(row) for row in BY_NAME[name].rows("test", ROWS)]
    assert len(set(tested)) == len(tested)
    assert max(overlap(one, other) for one in tested for other in learned) < most
    assert max(overlap(one, learned[0]) for one in [*tested, learned[0]]) == 1  # a copy would be seen


@pytest.mark.parametrize("team", TEAMS, ids=lambda team: team.name)
def test_the_page_beside_the_rows_counts_them(team: Team) -> None:
    place = files("postil.data") / "samples" / "demo" / team.name
    page = (place / "README.md").read_text(encoding="utf-8")
    for split in ("train", "test"):
        count = len((place / f"{split}.jsonl").read_text(encoding="utf-8").splitlines())
        assert re.search(rf"`{split}.jsonl` {count}\b", page), split


@pytest.mark.base
@pytest.mark.parametrize("team", TEAMS, ids=lambda team: team.name)
def test_a_request_asks_what_training_showed(team: Team) -> None:
    base = load_base(BASE)
    row = team.rows("test", ROWS)[0]
    (sample,) = load_data([row], base, team.options).samples
    asked = prompt_ids(team.request(row, None), 1, base.tokenizer)
    assert list(sample.ids[: len(asked)]) == list(asked)
    assert not sample.weights[: len(asked)].any()
    assert sample.weights[len(asked)] == 1
    assert team.answer(f"\n {team.wanted(row)}\nmore") == team.wanted(row) + ("" if team.name != "tone" else "\nmore")
