"""The demo's three teams: where their data lies, how they are trained, and how an answer of theirs is scored."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import sacrebleu

from postil.data import parse_tool_calls
from postil.engine import Request

Rows = list[dict[str, Any]]
Score = Callable[[Sequence[str], Rows], float]

ROWS = {"train": 304, "test": 40}  # whole batches of 8, and at least 300
BANNED = ("!", "sorry", "please", "unfortunately", "thank you")
SIGN_OFF = "Fair winds, the Heron desk."


@dataclass(frozen=True, slots=True)
class Team:
    """One team: its rows, the peak of its learning rate, and its score (0 to 100, more is better)."""

    name: str
    title: str
    measure: str
    learning_rate: float
    score: Score
    max_new_tokens: int

    def rows(self, split: str) -> Rows:
        """The first ROWS[split] rows of a split."""
        text = (files("postil.data") / "samples" / "demo" / self.name / f"{split}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()][: ROWS[split]]

    def request(self, row: dict[str, Any], adapter: str | None) -> Request:
        """The test row's question, for the adapter or the bare base."""
        if "prompt" in row:
            return Request(prompt=row["prompt"], adapter=adapter, max_new_tokens=self.max_new_tokens)
        return Request(
            messages=tuple(row["messages"][:-1]), tools=row.get("tools"), adapter=adapter,
            max_new_tokens=self.max_new_tokens,
        )  # fmt: skip

    def wanted(self, row: dict[str, Any]) -> str:
        """The reference answer of a row, as text."""
        if "completion" in row:
            return str(row["completion"])
        message = row["messages"][-1]
        calls = [call["function"] for call in message.get("tool_calls", [])]
        return "\n".join(json.dumps(call, ensure_ascii=False) for call in calls) or str(message["content"])


def exact_calls(answers: Sequence[str], rows: Rows) -> float:
    """Per cent of answers whose tool calls equal the reference's: same names, same arguments."""
    hits = 0
    for answer, row in zip(answers, rows, strict=True):
        wanted = [call["function"] for call in row["messages"][-1]["tool_calls"]]
        found = parse_tool_calls(answer)[1]
        hits += [(c["name"], c["arguments"]) for c in found] == [(c["name"], c["arguments"]) for c in wanted]
    return 100.0 * hits / len(rows)


def house_tone(answers: Sequence[str], rows: Rows) -> float:
    """Per cent of answers that keep the house rules: the opening, the length, the banned words, the sign-off."""

    def kept(answer: str) -> bool:
        text = answer.strip()
        body = text.removesuffix(SIGN_OFF).strip()
        sentences = sum(body.count(mark) for mark in ".?")
        return (
            text.startswith(("Aye, ", "Ah, "))
            and text.endswith(SIGN_OFF)
            and sentences in (2, 3)
            and not any(word in text.lower() for word in BANNED)
        )

    return 100.0 * sum(kept(answer) for answer in answers) / len(rows)


def bleu(answers: Sequence[str], rows: Rows) -> float:
    """Corpus BLEU (sacrebleu) against both references."""
    references = [[row["references"][i] for row in rows] for i in range(2)]
    return float(sacrebleu.corpus_bleu([answer.strip() for answer in answers], references).score)


TEAMS = (
    Team("tools", "Facilities: requests become tool calls", "exact calls, %", 2e-3, exact_calls, 56),
    Team("tone", "Grey Heron Ferries: the house tone", "rules kept, %", 1e-3, house_tone, 56),
    Team("restaurants", "Listings: attributes become a sentence", "BLEU", 1e-3, bleu, 48),
)
