"""Turn: one thread at a time runs a model, because what is in force while it runs is the model's own state."""

from __future__ import annotations

import threading
from types import TracebackType


class Turn:
    """A re-entrant lock as a context manager: another thread waits, the same one enters as often as it likes.

    A copy (of the model that it belongs to) has a turn of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[()]]:
        return Turn, ()
