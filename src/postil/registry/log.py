"""The log of a published name: one line an event, appended and never changed, whole again after a kill."""

from __future__ import annotations

import getpass
import json
import os
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Literal

from postil.errors import PostilError, RegistryError, StorageError
from postil.settings import Settings

Action = Literal["publish", "promote", "rollback", "refuse"]


class Event(Settings):
    """What was done: `alias` moved from version `before` to `version`, or a version refused (nothing moved).

    number: 1, 2, … within one name. gate: the expression asked, sentence: its answer. who, when (UTC) stand
    nowhere but here.
    """

    where: ClassVar[str] = "log of the registry"
    error: ClassVar[type[PostilError]] = RegistryError

    number: int
    action: Action
    alias: str
    version: str
    before: str | None = None
    gate: str = ""
    sentence: str = ""
    who: str = ""
    when: str = ""


def read_log(file: Path, moved: Iterable[Event] = ()) -> list[Event]:
    """The events in order. A last line that a kill cut short is left out.

    moved: the events that moved each alias last, as the aliases themselves hold them: one that a kill kept out
    of the log is put back in its place. Raises RegistryError for a line that is broken in any other way.
    """
    try:
        text = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        text = b""
    except OSError as problem:
        raise RegistryError(f"{file} cannot be read ({problem.strerror})") from None
    events = []
    for number, line in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):
        try:
            events.append(Event.parse(json.loads(line)))
        except (ValueError, RegistryError) as problem:
            raise RegistryError(
                f"{file}, line {number}: no event ({problem}); restore the file from a copy"
            ) from None
    last = events[-1].number if events else 0
    return events + sorted((event for event in moved if event.number > last), key=lambda event: event.number)


def append(file: Path, events: Iterable[Event]) -> None:
    """Append the events that the log does not end with yet, after cutting off a torn last line; fsync."""
    try:
        text = file.read_bytes() if file.exists() else b""
        whole = text.rfind(b"\n") + 1
        last = Event.parse(json.loads(text[:whole].splitlines()[-1])).number if whole else 0
        lines = [event.model_dump_json() + "\n" for event in events if event.number > last]
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


def stack(events: Iterable[Event], alias: str) -> list[str]:
    """The versions that `alias` went through and still has before it: a roll-back goes back to an earlier one.

    The last is what it points at, also where the log was restored from a copy that lacks events.
    """
    found: list[str] = []
    for event in events:
        if event.alias != alias or event.action == "refuse":
            continue
        if event.action == "rollback":
            while found and found[-1] != event.version:
                found.pop()
        if not found or found[-1] != event.version:
            found.append(event.version)
    return found


def who() -> str:
    """The user's name, or number where the system knows no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return str(os.getuid())


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
