"""The log of a name in a directory: one line an event, appended and never changed, whole again after a kill."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from postil.errors import Corrupt, RegistryError, StorageError, Unavailable
from postil.registry.state import Event


def read_log(file: Path, committed: Iterable[Event] = ()) -> list[Event]:
    """The events in order. A last line that a kill cut short is left out.

    committed: the last events, as they were committed elsewhere: those that a kill kept out of the log are put back
    in their place. Raises Corrupt for a line that is broken in any other way.
    """
    try:
        text = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        text = b""
    except OSError as problem:
        raise Unavailable(f"{file} cannot be read ({problem.strerror})") from None
    events = []
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):
        try:
            events.append(Event.parse(json.loads(line)))
        except (ValueError, RegistryError) as problem:
            raise Corrupt(f"{file}, line {number}: no event ({problem}); restore the file from a copy") from None
    last = events[-1].number if events else 0
    return events + sorted((event for event in committed if event.number > last), key=lambda event: event.number)


def append(file: Path, events: Iterable[Event]) -> None:
    """Append the events that the log does not end with yet, after cutting off a torn last line; fsync."""
    try:
        text = file.read_bytes() if file.exists() else b""
        whole = text.rfind(b"\n") + 1
        last = Event.parse(json.loads(text[:whole].splitlines()[-1])).number if whole else 0
        lines = [event.model_dump_json(exclude_defaults=True) + "\n" for event in events if event.number > last]
        if not lines and whole == len(text):
            return
        with open(file, "ab") as handle:
            handle.truncate(whole)
            handle.write("".join(lines).encode("utf-8"))
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise StorageError(
            f"{file} could not be written ({error.strerror or error}); free some space: the next change mends the log"
        ) from error


def who() -> str:
    """The user's name, or number where the system knows no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return str(os.getuid())


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
