"""The catalog in a directory: one file a name, replaced in one rename, which is the moment at which all happens."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from postil.errors import (
    Corrupt,
    NotFound,
    PostilError,
    RegistryConflict,
    RegistryError,
    StorageError,
    Unavailable,
)
from postil.files import remove_leftovers, write_json
from postil.registry import format1
from postil.registry.blobs import made
from postil.registry.log import append, now, read_log
from postil.registry.ports import Sweep
from postil.registry.state import Act, Event, State, applied
from postil.registry.version import MEND, Record, named, short
from postil.settings import Settings

MARKER = "registry.json"
FORMAT = 2
FORMATS = (1, FORMAT)  # that are read
PATIENCE = 60.0  # seconds to wait for another process that is writing

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_LIKE_A_VERSION = re.compile(r"[0-9a-f]{4,64}")


class _Kept(Settings):
    """state.json: a name as it stands, and the events of its last commit, which the log may lack after a kill."""

    where: ClassVar[str] = "state of a name"
    error: ClassVar[type[PostilError]] = RegistryError

    state: State
    last: list[Event] = Field(default_factory=list)


class DirectoryCatalog:
    """The catalog in a directory, one for a tenant. See postil.registry.ports.Catalog.

        registry.json                  what marks the directory
        names/<name>/state.json        the name as it stands: aliases, policies, versions, its base
        names/<name>/log.jsonl         every event of the name
        versions/<digest>.json         a version's manifest and score card
        blobs/<sha256>                 the bytes of its files (postil.registry.blobs)

    Writers take turns for the moment of a commit; no bytes of an adapter are copied or hashed in it. Nothing is made
    before the first commit. holds: whether the blob store has a blob.
    """

    def __init__(self, root: str | Path, holds: Callable[[str], bool]) -> None:
        self.root = Path(root)
        self.holds = holds

    # -- reading ----------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The names to which anything was done, sorted."""
        try:
            own = [path.parent.name for path in (self.root / "names").glob("*/state.json")]
            return sorted({*own, *format1.names(self.root)})
        except OSError as problem:
            raise Unavailable(f"{self.root} cannot be read ({problem.strerror})") from None

    def state(self, name: str) -> State:
        """The name as it stands."""
        kept = self._kept(name)
        return kept.state if kept is not None else format1.state(self.root, name)

    def events(self, name: str, since: int = 0, limit: int | None = None) -> list[Event]:
        """The events of a name; one that a kill kept from the log is there all the same."""
        kept = self._kept(name)  # read first: the log may be ahead of the state, never behind
        log = self._place(name) / "log.jsonl"
        found = read_log(log, kept.last) if kept is not None else format1.events(self.root, name)
        return [event for event in found if event.number > since][:limit]

    def record(self, digest: str) -> Record | None:
        """What is kept of a version, checked against its seal."""
        file = self._record(digest)
        try:
            value: Any = json.loads(file.read_text(encoding="utf-8"))
            seal = value.pop("seal")
            record: Record = Record.parse(value)
        except FileNotFoundError:
            return format1.record(self.root, digest)
        except (ValueError, KeyError, TypeError, AttributeError, RegistryError) as problem:
            raise Corrupt(f"{file} cannot be read ({problem}); {MEND}") from None
        except OSError as problem:
            raise Unavailable(f"{file} cannot be read ({problem.strerror})") from None
        if record.manifest.digest != digest or record.seal != seal:
            raise Corrupt(f"{file} was changed after it was published: it is not of version {short(digest)}; {MEND}")
        return record

    # -- writing ----------------------------------------------------------------------------------------

    def commit(
        self, name: str, expected: int, acts: Sequence[Act], actor: str, record: Record | None = None
    ) -> State:
        """Do all the acts, and keep the record, in one step."""
        check_name(name)
        for act in acts:
            if act.alias:
                check_alias(act.alias)
        with self._writing():
            before = self.state(name)
            if before.revision != expected:
                raise RegistryConflict(
                    f"{name} was written to by another process meanwhile (event {before.revision}, not {expected}); "
                    "look at it with `postil registry show` and run this again"
                )
            if record is not None:
                self._keep(record)
            if not acts:
                return before
            self._touch(acts)
            place = self._place(name)
            made(place)
            remove_leftovers(place)
            append(place / "log.jsonl", self.events(name))  # what a kill kept out, before the state forgets it
            at = now()
            events = [
                Event(**dict(act) | {"number": number, "who": actor, "when": at})
                for number, act in enumerate(acts, expected + 1)
            ]
            kept = _Kept(state=applied(before, events), last=events)
            write_json(place / "state.json", kept.model_dump(mode="json", exclude_defaults=True))
            append(place / "log.jsonl", events)
            format1.forget(self.root, name)
            return kept.state

    def collect(self, before: float, sweep: Sweep, dry: bool = False) -> tuple[list[str], int]:
        """Forget the versions that no name serves, then sweep the blobs."""
        with self._writing():
            served = set()
            for name in self.names():
                state = self.state(name)
                served |= {*state.served, *state.live.values()}
            known = self._records()
            gone = [digest for digest, touched in known.items() if digest not in served and touched < before]
            needed: set[str] = set()
            for digest in known.keys() - set(gone):
                record = self.record(digest)
                needed |= set(record.manifest.files.values()) if record is not None else set()
            if not dry:
                remove_leftovers(self.root / "versions")
                for digest in gone:
                    self._record(digest).unlink(missing_ok=True)
                    format1.remove(self.root, digest)
            return gone, sweep(needed)

    def _keep(self, record: Record) -> None:
        gone = [digest for digest in record.manifest.files.values() if not self.holds(digest)]
        if gone:
            raise RegistryConflict(
                f"{named(record.manifest.files, gone[0])} was collected while it was published; publish it again"
            )
        folder = self.root / "versions"
        made(folder)
        remove_leftovers(folder)
        file = self._record(record.manifest.digest)
        with contextlib.suppress(Corrupt):
            if file.is_file() and self.record(record.manifest.digest) == record:
                return
        write_json(file, record.model_dump(mode="json") | {"seal": record.seal})

    def _touch(self, acts: Sequence[Act]) -> None:
        """Let the grace of the versions concerned begin now."""
        for version in {act.version for act in acts} - {""}:
            for file in (self._record(version), *format1.manifests(self.root, version)):
                with contextlib.suppress(OSError):  # not there, or another user's: then its grace began earlier
                    os.utime(file)

    def _records(self) -> dict[str, float]:
        own = {path.stem: path.stat().st_mtime for path in (self.root / "versions").glob("[!.]*.json")}
        return format1.records(self.root) | own

    def _record(self, digest: str) -> Path:
        return self.root / "versions" / f"{digest}.json"

    def _place(self, name: str) -> Path:
        return self.root / "names" / name

    def _kept(self, name: str) -> _Kept | None:
        file = self._place(name) / "state.json"
        try:
            kept: _Kept = _Kept.parse(json.loads(file.read_text(encoding="utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as problem:
            raise Unavailable(f"{file} cannot be read ({problem.strerror})") from None
        except (ValueError, RegistryError) as problem:
            raise Corrupt(f"{file} is no state of a name ({problem}); restore it from a copy") from None
        return kept

    # -- the directory ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise NotFound where no registry is there, RegistryError for one of an unknown format."""
        marker = self.root / MARKER
        try:
            if not self.root.is_dir():
                raise NotFound(f"{self.root} is no directory; `postil publish` makes a registry there")
            if not marker.is_file():
                raise NotFound(f"{self.root} holds no {MARKER} and is no registry; name another --registry")
            found = json.loads(marker.read_text(encoding="utf-8")).get("format")
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
            found = None
        except OSError as problem:
            raise Unavailable(f"{marker} cannot be read ({problem.strerror}); name another --registry") from None
        if found not in FORMATS:
            raise RegistryError(f"{marker}: format {found!r} is not the known {FORMAT}; it needs another postil")

    def make(self) -> None:
        """Make the registry where there is none yet."""
        with self._writing():
            pass

    def check_own(self) -> None:
        """As check, but what does not exist yet, or holds nothing, may become a registry."""
        try:
            names = [path.name for path in self.root.iterdir()]  # one look: a first writer may be at it meanwhile
        except FileNotFoundError:
            return
        except NotADirectoryError:
            self.check()
            return
        except OSError as problem:
            raise Unavailable(f"{self.root} cannot be read ({problem.strerror}); name another --registry") from None
        if any(name[0] != "." for name in names):
            self.check()

    def _mark(self) -> None:
        """Write the marker where there is none; one of format 1 becomes one of 2, which older postils refuse."""
        marker = self.root / MARKER
        if marker.exists():
            self.check()
            if json.loads(marker.read_text(encoding="utf-8"))["format"] == FORMAT:
                return
        remove_leftovers(self.root)
        write_json(marker, {"format": FORMAT})

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time in this registry, which is made where there is nothing yet; a kill frees the lock."""
        import filelock

        try:
            self.check_own()
            self.root.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.root / ".lock", timeout=PATIENCE):
                self._mark()
                yield
        except filelock.Timeout:
            raise Unavailable(
                f"another process has been writing to {self.root} for {PATIENCE:.0f} seconds; run this again later"
            ) from None
        except OSError as error:
            if isinstance(error, PostilError):
                raise
            raise StorageError(
                f"{self.root} could not be written ({error.strerror or error}); choose another --registry"
            ) from error


def check_name(name: str) -> None:
    """Raise RegistryError for a name that could not be a folder's, or be told from an alias."""
    if not _NAME.fullmatch(name):
        raise RegistryError(
            f"{name!r} cannot be a published name; take lower-case letters, digits and . _ - (64 at most), "
            "for example support"
        )


def check_alias(alias: str) -> None:
    """Raise RegistryError for a word that cannot be an alias, or that could be taken for a version."""
    if not _ALIAS.fullmatch(alias) or _LIKE_A_VERSION.fullmatch(alias):
        raise RegistryError(
            f"{alias!r} cannot be an alias; take a word of lower-case letters, digits, _ and - that does not read "
            "like the beginning of a version (0-9, a-f only), for example live"
        )
