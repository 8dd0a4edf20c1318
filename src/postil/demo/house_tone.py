"""Grey Heron Ferries' own measure: does an answer keep the house rules; for `postil judge --metrics`."""

from __future__ import annotations

from typing import Any

BANNED = ("!", "sorry", "please", "unfortunately", "thank you")
SIGN_OFF = "Fair winds, the Heron desk."


def house_tone(answer: str, row: dict[str, Any]) -> float:
    """100 where the opening, the length, the words and the sign-off are as the house wants them, else 0."""
    text = answer.strip()
    body = text.removesuffix(SIGN_OFF).strip()
    sentences = sum(body.count(mark) for mark in ".?")
    kept = (
        text.startswith(("Aye, ", "Ah, "))
        and text.endswith(SIGN_OFF)
        and sentences in (2, 3)
        and not any(word in text.lower() for word in BANNED)
    )
    return 100.0 if kept else 0.0
