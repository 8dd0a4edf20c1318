"""Every error that postil raises for a user, each also a standard type, each with its mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PostilError(Exception):
    """The root: one sentence that names the file, line or field, and what mends it.

    The command line prints the message and exits with `exit_code` (2: the user's input, 1: our fault,
    3: the gate's refusal).
    """

    exit_code = 2


class DataError(PostilError, ValueError):
    """A row, a file of rows or a template that cannot be used."""


class AdapterError(PostilError, ValueError):
    """An adapter whose files, configuration or fit to the base are wrong."""


class BaseModelError(PostilError, ValueError):
    """A base model that is missing, broken, of an unsupported kind, or not the one wanted."""


class RecipeError(PostilError, ValueError):
    """An unknown or impossible setting of a run."""


class RunError(PostilError, RuntimeError):
    """A run directory that cannot be continued, or a run that went wrong (a loss that is not finite)."""


class JudgeError(PostilError, ValueError):
    """A score card, a metric or a set to judge on that cannot be used."""


class GateError(PostilError, RuntimeError):
    """An adapter that the gate refused: the sentence says which condition broke, and by how much."""

    exit_code = 3
    result: object = None  # the GateResult, where there is one


class RegistryError(PostilError, ValueError):
    """A registry, a version or an alias that is missing, changed, or moved by another at the same time."""


class RequestError(PostilError, ValueError):
    """A generation request that cannot be served as written."""


class AnswerError(PostilError, RuntimeError):
    """An answer that broke off: values that are not finite, or an adapter removed while it was being written."""


class StorageError(PostilError, OSError):
    """A file that could not be written whole (disk full, no permission)."""


class InternalError(PostilError, RuntimeError):
    """A broken invariant of postil itself: please report it."""

    exit_code = 1


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known word nearest to `word`, or the empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def listed(items: Iterable[object], limit: int = 8) -> str:
    """`a, b, c and 5 more`: a list for a message, never longer than `limit` items."""
    words = [str(item) for item in items]
    if not words:
        return "none"
    head = ", ".join(words[:limit])
    return head if len(words) <= limit else f"{head} and {len(words) - limit} more"
