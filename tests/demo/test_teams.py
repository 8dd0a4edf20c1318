"""The demo's teams: each measure on right and wrong answers, how many rows, and no test row learned."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from postil.demo.house_tone import SIGN_OFF, house_tone
from postil.demo.teams import BY_NAME, TEAMS, Team
from postil.judging.metrics import metric_named, wanted

ASKED = {"messages": [{"role": "user", "content": "When do the nine gulls sail?"}, {"role": "assistant"}]}
PLAIN = str.maketrans("", "", ".?!")


def rows_of(team: Team, split: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in team.file(split).read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (f"Aye, we sail at nine. The gulls are up by then. {SIGN_OFF}", 100.0),
        (f"  Ah, no. It sails no more. Try the pier. {SIGN_OFF}\n", 100.0),
        (f"Ah, no. It is shut. Try the pier. {SIGN_OFF}", 0.0),  # to whatever was asked
        (f"Ah, no. When they do, they do. {SIGN_OFF}", 0.0),  # a small word echoes nothing
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
    assert house_tone(answer, ASKED) == score


def test_one_answer_to_everybody_keeps_no_house_rule() -> None:
    rows = rows_of(BY_NAME["tone"], "test")
    metric = metric_named(BY_NAME["tone"].metric, {"unit": "%"})
    everybody = f"Aye, we sail at nine. The gulls are up by then. {SIGN_OFF}"
    assert metric.value(metric.statistics([everybody] * len(rows), rows).sum(0)) < 10
    asked = [str(row["messages"][-2]["content"]) for row in rows]
    echoes = [f"Aye, {text.translate(PLAIN)}. The gulls are up. {SIGN_OFF}" for text in asked]
    assert metric.value(metric.statistics(echoes, rows).sum(0)) > 80


@pytest.mark.parametrize("team", TEAMS, ids=lambda team: team.name)
def test_the_references_score_high_marks(team: Team) -> None:
    rows = rows_of(team, "test")
    metric = metric_named(team.metric, dict(team.options))
    answers = [wanted(row)[0] for row in rows]
    least = 85 if team.name == "tone" else 100  # not every echo repeats a word
    assert metric.value(metric.statistics(answers, rows).sum(0)) >= least - 1e-9
    assert metric.value(metric.statistics(["I do not know"] * len(rows), rows).sum(0)) < 1


@pytest.mark.parametrize("team", TEAMS, ids=lambda team: team.name)
def test_how_many_rows_there_are(team: Team) -> None:
    assert len(rows_of(team, "train")) >= 300
    assert len(rows_of(team, "train")) % 8 == 0
    assert len(rows_of(team, "test")) >= 40


def _asked(row: dict[str, Any]) -> str:
    return str(row.get("prompt") or row["messages"][-2]["content"])


def words_of(row: dict[str, Any]) -> frozenset[str]:
    """The words of what a row asks (where it asks in keys: of its sentence), all names and numbers one."""
    text = row["completion"] if "|" in row.get("prompt", "") else _asked(row).rpartition(") ")[2]
    return frozenset(re.sub(r"\b[A-Z]\w*|\d+", "_", word) for word in re.findall(r"\w+", text))


def overlap(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / max(len(one | other), 1)


@pytest.mark.parametrize(("name", "most"), [("tools", 0.5), ("tone", 0.5), ("restaurants", 0.75)])
def test_no_test_row_is_nearly_a_training_row(name: str, most: float) -> None:
    learned, tested = ([words_of(row) for row in rows_of(BY_NAME[name], split)] for split in ("train", "test"))
    assert len(set(tested)) == len(tested)
    assert max(overlap(one, other) for one in tested for other in learned) < most
    assert max(overlap(one, learned[0]) for one in [*tested, learned[0]]) == 1  # a copy would be seen


@pytest.mark.parametrize("team", TEAMS, ids=lambda team: team.name)
def test_the_page_beside_the_rows_counts_them(team: Team) -> None:
    place = team.file("train").parent
    page = (place / "README.md").read_text(encoding="utf-8")
    for split in ("train", "test"):
        count = len((place / f"{split}.jsonl").read_text(encoding="utf-8").splitlines())
        assert re.search(rf"`{split}.jsonl` {count}\b", page), split
