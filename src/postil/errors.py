"""Every error that postil raises for a user, each also a standard type, each with its mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PostilError(Exception):
    """The root: one sentence that names the file, line or field, and what mends it.

    The command line prints the message and exits with `exit_code` (2: the user's input, 1: our fault,
    3: the gate's or a policy's refusal, 4: run it again, another was quicker or a place was out of reach).
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
    """A registry that was asked for something impossible, or that is none; its kinds are told apart below."""


class NotFound(RegistryError):
    """A registry, a name, a version or an alias that is not there."""


class Corrupt(RegistryError):
    """What a registry holds and somebody changed, cut short or removed: not the bytes that were published."""


class RegistryConflict(RegistryError):
    """Another moved the alias, or wrote to the name, meanwhile: look at it and run it again."""

    exit_code = 4


class Unavailable(RegistryError):
    """A registry that cannot be reached or is being written to: run it again later."""

    exit_code = 4


class Refused(RegistryError, GateError):
    """What the policy of an alias does not let through; `result` is the GateResult."""


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
