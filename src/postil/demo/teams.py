"""The demo's three teams: where their data lies, how they are trained, and how an answer of theirs is scored."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import sacrebleu

from postil.data import DataOptions
from postil.engine import Request

Rows = list[dict[str, Any]]
Score = Callable[[Sequence[str], Rows], float]

BANNED = ("!", "sorry", "please", "unfortunately", "thank you")
PLAIN = DataOptions(format="raw")  # prompt, line break, completion: no chat template
SIGN_OFF = "Fair winds, the Heron desk."


@dataclass(frozen=True, slots=True)
class Team:
    """One team: its rows and how they are read, the learning rate's peak, its score (0 to 100, more is better)."""

    name: str
    title: str
    measure: str
    learning_rate: float
    score: Score
    max_new_tokens: int
    options: DataOptions = field(default_factory=DataOptions)

    def rows(self, split: str, counts: Mapping[str, int] | None = None) -> Rows:
        """A split's rows; the first counts[split] of them where counts are given."""
        text = (files("postil.data") / "samples" / "demo" / self.name / f"{split}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()][: None if counts is None else counts[split]]

    def request(self, row: dict[str, Any], adapter: str | None) -> Request:
        """The test row's question, for the adapter or the bare base."""
        settings: dict[str, Any] = {"adapter": adapter, "max_new_tokens": self.max_new_tokens}
        if "prompt" in row:
            return Request(prompt=row["prompt"] + self.options.separator, raw=True, **settings)
        return Request(messages=tuple(row["messages"][:-1]), **settings)

    def answer(self, text: str) -> str:
        """The answer in what a model wrote: where plain text is continued, the first line that says something."""
        return text.strip().partition("\n")[0] if self.options is PLAIN else text.strip()

    def asked(self, row: dict[str, Any]) -> str:
        """What a row asks, as text."""
        return str(row.get("prompt") or row["messages"][-2]["content"])

    def wanted(self, row: dict[str, Any]) -> str:
        """The reference answer of a row, as text."""
        return str(row.get("completion") or row["messages"][-1]["content"])


def exact_calls(answers: Sequence[str], rows: Rows) -> float:
    """Per cent of answers that are JSON and call the reference's tool with the same arguments."""

    def equal(answer: str, row: dict[str, Any]) -> bool:
        try:
            return bool(json.loads(answer) == json.loads(row["completion"]))
        except ValueError:
            return False

    return 100.0 * sum(equal(answer, row) for answer, row in zip(answers, rows, strict=True)) / len(rows)


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
    Team("tools", "Facilities: requests become tool calls", "exact calls, %", 5e-3, exact_calls, 46, PLAIN),
    Team("tone", "Grey Heron Ferries: the house tone", "rules kept, %", 3e-3, house_tone, 50),
    Team("restaurants", "Listings: attributes become a sentence", "BLEU", 2.5e-3, bleu, 44, PLAIN),
)
BY_NAME = {team.name: team for team in TEAMS}
