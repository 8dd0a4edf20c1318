"""Versions as adapter directories in the user's cache: fetched and verified once, known by their stamps."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

from postil.errors import Corrupt, StorageError
from postil.files import atomic_directory, write_json
from postil.registry.ports import Blobs
from postil.registry.version import MANIFEST, MEND, Manifest, named, short

IDLE = 30  # days after which a version that nobody asked for leaves the cache


def versions_directory() -> Path:
    """Where fetched versions live, an adapter directory each."""
    from postil.base.cache import cache_directory

    return cache_directory() / "versions"


def materialise(blobs: Blobs, manifest: Manifest, place: Path | None = None) -> Path:
    """The adapter directory of a version in the cache, each byte verified against the manifest as it was fetched.

    One that was fetched before is told by the sizes, times and inodes of its files, without reading them; one that
    was touched since is fetched again. Processes that want the same version wait for the first of them. Raises
    Corrupt naming the file of the version, StorageError where the cache cannot be written.
    """
    import filelock

    place = versions_directory() if place is None else place
    target = place / manifest.digest
    try:
        if unchanged(target, manifest):
            with contextlib.suppress(OSError):  # a cache that may only be read is one all the same
                os.utime(_stamps(target))
            return target
        place.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(place / f".{manifest.digest}.lock"):
            if not unchanged(target, manifest):
                _fetched(blobs, manifest, target)
                _prune(place, target)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"{target} could not be written ({error.strerror or error}); free some space, or set POSTIL_HOME to "
            "another directory"
        ) from error
    return target


def unchanged(directory: Path, manifest: Manifest) -> bool:
    """Whether the files of a version in the cache are those that were verified when it was fetched."""
    try:
        known = json.loads(_stamps(directory).read_text(encoding="utf-8"))
        return bool(known == _found(directory, [*manifest.files, MANIFEST]))
    except (OSError, ValueError, TypeError):
        return False


def _fetched(blobs: Blobs, manifest: Manifest, target: Path) -> None:
    _stamps(target).unlink(missing_ok=True)
    for left in target.parent.glob(f".postil-tmp-{target.name}-*"):
        shutil.rmtree(left, ignore_errors=True)  # of a process that was killed: nobody else fetches this version now
    with atomic_directory(_own(target), marker=MANIFEST) as temporary:
        for name, digest in manifest.files.items():
            try:
                blobs.fetch(digest, temporary / name)
            except Corrupt as problem:
                found = f"{problem}: it is {named(manifest.files, digest)} of version {short(manifest.digest)}"
                raise Corrupt(f"{found}; {MEND}") from None
        write_json(temporary / MANIFEST, manifest.model_dump(mode="json"))
        stamps = _found(temporary, [*manifest.files, MANIFEST])
    write_json(_stamps(target), stamps)


def _own(target: Path) -> Path:
    """The place for a version, without what somebody made of it."""
    if target.exists() and not (target / MANIFEST).is_file():
        shutil.rmtree(target, ignore_errors=True)
    return target


def _prune(place: Path, keep: Path) -> None:
    """Remove the versions that nobody asked for in a long time."""
    for stamps in place.glob("*.json"):
        directory = stamps.with_suffix("")
        if directory != keep and time.time() - stamps.stat().st_mtime > IDLE * 86400:
            stamps.unlink(missing_ok=True)
            shutil.rmtree(directory, ignore_errors=True)


def _stamps(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.json")


def _found(directory: Path, names: list[str]) -> dict[str, list[int]]:
    """What the system says of each file: a change that keeps size and time still has another inode or change time."""
    facts = {name: os.stat(directory / name) for name in names}
    return {name: [f.st_size, f.st_mtime_ns, f.st_ctime_ns, f.st_ino] for name, f in facts.items()}
