"""Registries of format 1, read as they lie; what is written next to a name or version moves it to format 2.

versions/<digest>/             an adapter directory and its version.json
refused/<digest>/              the same of what the gate refused
aliases/<name>/<alias>.json    the event that moved the alias last
aliases/<name>/log.jsonl       every event of the name
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from postil.errors import Corrupt, RegistryError
from postil.files import sha256_file
from postil.registry.log import read_log
from postil.registry.state import Alias, Event, Publication, State, applied
from postil.registry.version import MANIFEST, MEND, Manifest, Record, short

SHELVES = ("versions", "refused")
OWN = "postil.json"


def names(root: Path) -> list[str]:
    """The names that format 1 holds."""
    return [path.name for path in _listed(root / "aliases") if path.is_dir()]


def events(root: Path, name: str) -> list[Event]:
    """Every event of a name; one that a kill kept from the log is there all the same."""
    moved = _moved(root, name).values()  # read first: the log may be ahead of the aliases, never behind
    return read_log(root / "aliases" / name / "log.jsonl", moved)


def state(root: Path, name: str) -> State:
    """The name as it stands: where its aliases say, bound to the base of what it served last."""
    found = applied(State(), events(root, name))
    aliases = dict(found.aliases)
    for alias, event in _moved(root, name).items():
        stack = [digest for digest in found.stack(alias) if digest != event.version]
        if found.live.get(alias) != event.version:
            aliases[alias] = Alias(version=event.version, revision=event.number, before=tuple(stack))
    published, base = {}, ""
    for digest in found.served:
        kept = None
        with contextlib.suppress(Corrupt):  # told where the version itself is asked for
            kept = record(root, digest)
        source = kept.manifest.base.get("source", "") if kept is not None else ""
        scope = str((kept.card or {}).get("scope", "")) if kept is not None else ""
        published[digest] = Publication(number=found.published[digest].number, base=source, scope=scope)
        base = source or base
    live = aliases.get("live")
    if live is not None and live.version in published:
        base = published[live.version].base or base
    return State(**(dict(found) | {"aliases": aliases, "published": published, "base": base}))


def forget(root: Path, name: str) -> None:
    """Remove what format 1 holds of a name, once format 2 holds it."""
    shutil.rmtree(root / "aliases" / name, ignore_errors=True)


def records(root: Path) -> dict[str, float]:
    """Version → the time at which it was written."""
    return {path.name: (path / MANIFEST).stat().st_mtime for path in _places(root)}


def record(root: Path, digest: str) -> Record | None:
    """What is known of a version, its manifest and its card checked against their digests."""
    place = _place(root, digest)
    if place is None:
        return None
    manifest = _manifest(place)
    if manifest.digest != digest:
        raise Corrupt(f"{place / MANIFEST} was changed: it is not of version {short(digest)}; {MEND}")
    return Record(manifest=manifest, card=_card(place, manifest))


def blob(root: Path, digest: str) -> Path | None:
    """The file of a version with this SHA-256."""
    for place in _places(root):
        try:
            files = _manifest(place).files
        except Corrupt:
            continue  # named where its own version is asked for
        for name, found in files.items():
            if found == digest and (place / name).is_file():
                return place / name
    return None


def manifests(root: Path, digest: str) -> list[Path]:
    """The files whose time says when a version was written."""
    return [root / shelf / digest / MANIFEST for shelf in SHELVES]


def remove(root: Path, digest: str) -> None:
    """Remove a version."""
    for shelf in SHELVES:
        shutil.rmtree(root / shelf / digest, ignore_errors=True)


def _card(place: Path, manifest: Manifest) -> dict[str, object] | None:
    file = place / OWN
    if OWN not in manifest.files:
        return None
    try:
        if sha256_file(file) != manifest.files[OWN]:
            raise Corrupt(f"{file} was changed after it was published; {MEND}")
        card: dict[str, object] | None = json.loads(file.read_text(encoding="utf-8"))["card"].get("score_card")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as problem:
        if isinstance(problem, Corrupt):
            raise
        raise Corrupt(f"{file} cannot be read ({problem}); {MEND}") from None
    return card


def _manifest(place: Path) -> Manifest:
    try:
        manifest: Manifest = Manifest.parse(json.loads((place / MANIFEST).read_text(encoding="utf-8")))
    except (ValueError, OSError) as problem:
        raise Corrupt(f"{place / MANIFEST} cannot be read ({problem}); {MEND}") from None
    return manifest


def _place(root: Path, digest: str) -> Path | None:
    found = (root / shelf / digest for shelf in SHELVES)
    return next((place for place in found if (place / MANIFEST).is_file()), None)


def _places(root: Path) -> Iterator[Path]:
    for shelf in SHELVES:
        for place in _listed(root / shelf):
            if (place / MANIFEST).is_file():
                yield place


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.name[0] != ".")
    except (FileNotFoundError, NotADirectoryError):
        return []


def _moved(root: Path, name: str) -> dict[str, Event]:
    """The event that moved each alias last, from its file."""
    found = {}
    for file in sorted((root / "aliases" / name).glob("[!.]*.json")):
        try:
            found[file.stem] = Event.parse(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, OSError, RegistryError) as problem:
            raise Corrupt(f"{file} is no alias ({problem}); restore it from a copy") from None
    return found
