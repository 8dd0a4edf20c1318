"""Grey Heron Ferries' own measure: does an answer keep the house rules; for `postil judge --metrics`."""

from __future__ import annotations

import re
from typing import Any

BANNED = ("!", "sorry", "please", "unfortunately", "thank you")
SIGN_OFF = "Fair winds, the Heron desk."
SMALL = {
    "been", "does", "from", "have", "here", "more", "than", "that", "them", "then", "they", "this", "were", "what",
    "when", "will", "with", "your",
}  # fmt: skip


def house_tone(answer: str, row: dict[str, Any]) -> float:
    """100 where the opening, the echo, the length, the words and the sign-off are as the house wants them, else 0.

    The echo is a word of the customer's: without it one and the same answer to everybody would keep all rules.
    """
    text = answer.strip()
    body = text.removesuffix(SIGN_OFF).strip()
    sentences = sum(body.count(mark) for mark in ".?")
    kept = (
        text.startswith(("Aye, ", "Ah, "))
        and text.endswith(SIGN_OFF)
        and sentences in (2, 3)
        and not any(word in text.lower() for word in BANNED)
        and bool(_words(body) & _words(row["messages"][-2]["content"]))
    )
    return 100.0 if kept else 0.0


def _words(text: str) -> set[str]:
    """The beginnings of a text's words of four letters or more, but for those that every text has."""
    return {word[:4] for word in re.findall(r"[a-z]{4,}", text.lower()) if word not in SMALL}
