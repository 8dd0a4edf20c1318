"""Where versions, aliases and logs lie: the few operations that a registry needs, on a directory."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from postil.errors import RegistryError, StorageError
from postil.files import atomic_directory, remove_leftovers, sha256_file, write_json
from postil.registry.log import Action, Event, append, now, read_log, who
from postil.registry.version import MANIFEST, SHORT, Manifest, verified

Shelf = Literal["versions", "refused"]
MARKER = "registry.json"
FORMAT = 1
PATIENCE = 60.0  # seconds to wait for another process that is writing

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_ALIAS = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_LIKE_A_VERSION = re.compile(r"[0-9a-f]{4,64}")


class DirectoryStore:
    """The store on a directory, one for a tenant:

        registry.json                  what marks the directory
        versions/<digest>/             an adapter directory and its version.json
        refused/<digest>/              the same of what the gate refused, with refusal.json
        aliases/<name>/<alias>.json    the event that moved the alias last, in one rename: what it points to
        aliases/<name>/log.jsonl       every event of the name

    Another kind of store (a database, several machines) offers the same methods: put, get, digests and drop for
    versions, which never change; names, aliases, swap, record and log for what moves. Only swap decides between
    two writers. Nothing is made before the first write.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    # -- versions ---------------------------------------------------------------------------------------

    def put(self, shelf: Shelf, manifest: Manifest, source: Path, extra: Mapping[str, Any] | None = None) -> bool:
        """Copy the files of a version from the directory `source`, at once; False where they lay here already.

        A version whose bytes were changed here is restored. extra: file name → JSON kept beside, outside the
        digest. Raises RegistryError where a file changed since `manifest` was made, StorageError on a full disk.
        """
        target = self.root / shelf / manifest.digest
        with self._writing():
            remove_leftovers(target.parent)
            new = not self._whole(shelf, manifest.digest)
            if new:
                if not (target / MANIFEST).is_file():
                    shutil.rmtree(target, ignore_errors=True)  # a part of a version is none
                with atomic_directory(target, marker=MANIFEST) as temporary:
                    for name, expected in manifest.files.items():
                        shutil.copyfile(source / name, temporary / name)
                        if sha256_file(temporary / name) != expected:
                            raise RegistryError(f"{source / name} changed while it was published; publish it again")
                    write_json(temporary / MANIFEST, manifest.model_dump(mode="json"))
                    for name, value in (extra or {}).items():
                        write_json(temporary / name, value)
            else:
                for name, value in (extra or {}).items():
                    write_json(target / name, value)
        return new

    def get(self, shelf: Shelf, digest: str) -> tuple[Path, Manifest]:
        """The directory of a version, every byte verified. Raises RegistryError naming what is wrong."""
        directory = self.root / shelf / digest
        return directory, verified(directory, digest)

    def digests(self, shelf: Shelf) -> list[str]:
        """The versions on a shelf, sorted."""
        place = self.root / shelf
        return sorted(path.name for path in place.iterdir() if path.name[0] != ".") if place.is_dir() else []

    def drop(self, shelf: Shelf, digest: str) -> None:
        """Remove a version from a shelf, where it is there."""
        with self._writing():
            shutil.rmtree(self.root / shelf / digest, ignore_errors=True)

    def _whole(self, shelf: Shelf, digest: str) -> bool:
        try:
            self.get(shelf, digest)
        except RegistryError:
            return False
        return True

    # -- aliases ----------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The published names, sorted."""
        place = self.root / "aliases"
        try:
            return sorted(path.name for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
        except OSError as problem:
            raise RegistryError(f"{place} cannot be read ({problem.strerror})") from None

    def aliases(self, name: str) -> dict[str, str]:
        """Alias → version of a name; empty where the name is not known."""
        return {alias: event.version for alias, event in self._moved(name).items()}

    def swap(
        self, name: str, alias: str, expected: str | None, version: str, *,
        action: Action, gate: str = "", sentence: str = "",
    ) -> None:  # fmt: skip
        """Compare and set: point `alias` at `version` if it still points at `expected` (None: at nothing yet).

        The rename of the alias's file is the one moment at which it happens; the log follows. Raises
        RegistryError where another process has moved it; to `version` itself is no conflict.
        """
        check_name(name)
        check_alias(alias)
        with self._writing():
            place = self._place(name)
            remove_leftovers(place)
            current = self.aliases(name).get(alias)
            if current == version:
                return
            if current != expected:
                raise RegistryError(
                    f"{name}@{alias} points at {_short(current)} and no longer at {_short(expected)}: another "
                    "process moved it meanwhile; look at it with `postil show` and run this again"
                )
            append(place / "log.jsonl", self.log(name))  # what a kill kept out, before the alias forgets it
            event = self._event(name, action, alias, version, current, gate, sentence)
            write_json(place / f"{alias}.json", event.model_dump(mode="json"))
            append(place / "log.jsonl", self.log(name))

    def record(self, name: str, action: Action, alias: str, version: str, *, gate: str, sentence: str) -> None:
        """Log an event that moves nothing."""
        check_name(name)
        with self._writing():
            before = self.aliases(name).get(alias)
            event = self._event(name, action, alias, version, before, gate, sentence)
            append(self._place(name) / "log.jsonl", [*self.log(name), event])

    def log(self, name: str) -> list[Event]:
        """Every event of a name in order; one that a kill kept from its file is there all the same."""
        moved = self._moved(name).values()  # read first: the log may be ahead of the aliases, never behind
        return read_log(self.root / "aliases" / name / "log.jsonl", moved)

    def _event(
        self, name: str, action: Action, alias: str, version: str, before: str | None, gate: str, sentence: str
    ) -> Event:
        events = self.log(name)
        return Event(
            number=events[-1].number + 1 if events else 1, action=action, alias=alias, version=version,
            before=before, gate=gate, sentence=sentence, who=who(), when=now(),
        )  # fmt: skip

    def _moved(self, name: str) -> dict[str, Event]:
        """The event that moved each alias last, from its file."""
        found = {}
        for file in sorted((self.root / "aliases" / name).glob("[!.]*.json")):
            try:
                found[file.stem] = Event.parse(json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, OSError) as problem:
                raise RegistryError(f"{file} is no alias ({problem}); restore it from a copy") from None
        return found

    def _place(self, name: str) -> Path:
        place = self.root / "aliases" / name
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{place} could not be made ({error.strerror}); choose another --registry") from error
        return place

    # -- the directory ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise RegistryError where the directory is not there, or is no registry of this format."""
        marker = self.root / MARKER
        try:
            if not self.root.is_dir():
                raise RegistryError(f"{self.root} is no directory; `postil publish` makes a registry there")
            if not marker.is_file():
                raise RegistryError(f"{self.root} holds no {MARKER} and is no registry; name another --registry")
            found = json.loads(marker.read_text(encoding="utf-8")).get("format")
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
            found = None
        except OSError as problem:
            raise RegistryError(f"{marker} cannot be read ({problem.strerror}); name another --registry") from None
        if found != FORMAT:
            raise RegistryError(f"{marker}: format {found!r} is not the known {FORMAT}; it needs another postil")

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
            raise RegistryError(f"{self.root} cannot be read ({problem.strerror}); name another --registry") from None
        if any(name[0] != "." for name in names):
            self.check()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time in this registry, which is made where there is nothing yet; a kill frees the lock."""
        import filelock

        try:
            self.check_own()
            self.root.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.root / ".lock", timeout=PATIENCE):
                if not (self.root / MARKER).exists():
                    remove_leftovers(self.root)
                    write_json(self.root / MARKER, {"format": FORMAT})
                self.check()
                yield
        except filelock.Timeout:
            raise RegistryError(
                f"another process has been writing to {self.root} for {PATIENCE:.0f} seconds; run this again later"
            ) from None
        except OSError as error:
            if isinstance(error, StorageError):
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


def _short(version: str | None) -> str:
    return version[:SHORT] if version else "nothing"
