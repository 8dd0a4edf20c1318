"""What defines a measure, as a digest: two cards' measures are compared only where it is the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from postil.errors import JudgeError
from postil.judging.metrics.own import is_own

DIGITS = 16  # of SHA-256 that a card shows


def definition_of(measure: str, told: Mapping[str, Any]) -> str:
    """The digest of a measure's name and of all that decides what it gives, `told` as JSON values."""
    text = json.dumps([measure, told], sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:DIGITS]


def source_of(name: str) -> str:
    """The digest of the file that a user's own metric, `path/to/file.py:function`, stands in; "" for any other.

    Raises JudgeError where the file cannot be read.
    """
    if not is_own(name):
        return ""
    path = Path(name.rpartition(":")[0])
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as problem:
        raise JudgeError(f"{path} could not be read ({problem.strerror}).") from None
