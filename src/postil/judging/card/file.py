"""The score card read back from an adapter's postil.json."""

from __future__ import annotations

import json
from pathlib import Path

from postil.errors import JudgeError
from postil.judging.card.model import ScoreCard

KEY = "score_card"  # in the "card" of postil.json


def read_card(directory: str | Path) -> ScoreCard | None:
    """The score card of an adapter directory, None where it was never judged.

    Raises JudgeError, naming the file and the field, for a card that cannot be read.
    """
    file = Path(directory) / "postil.json"
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_text(encoding="utf-8"))["card"].get(KEY)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as problem:
        raise JudgeError(f"{file} cannot be read ({problem!r}); save the adapter anew and judge it") from None
    if value is None:
        return None
    try:
        card: ScoreCard = ScoreCard.parse(value)
    except JudgeError as problem:
        raise JudgeError(f"{file}: {problem}; judge the adapter again") from None
    return card
