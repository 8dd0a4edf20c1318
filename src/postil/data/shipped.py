"""The samples that ship with postil: prose and chat prompts to judge on, and others to hold to while training."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, Literal

Name = Literal["general", "chat", "hold_prose", "hold_chat"]

SHIPPED = "shipped"  # what a user writes for them
NAMES: dict[Name, str] = {
    "general": "postil's general sample",
    "chat": "postil's chat prompts",
    "hold_prose": "postil's prose to hold to",
    "hold_chat": "postil's chat prompts to hold to",
}


def shipped_rows(name: Name) -> list[dict[str, Any]]:
    """The rows of one sample: {"text"} or {"kind", "prompt" or "messages"}. What is judged on is in no sample that is
    held to."""
    text = (files("postil.data") / "samples" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
