"""Blobs in a directory: files named by the SHA-256 of their bytes, copied and hashed in one pass, under no lock."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection
from pathlib import Path

from postil.errors import Corrupt, RegistryError, StorageError
from postil.files import atomic_file, sha256_file
from postil.registry import format1

CHUNK = 1 << 20


class DirectoryBlobs:
    """The blob store in `root`/blobs; what a registry of format 1 holds in its versions' own directories is read
    there. See postil.registry.ports.Blobs."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.place = self.root / "blobs"

    def has(self, digest: str) -> bool:
        """Whether a blob is there."""
        return self._find(digest) is not None

    def put(self, digest: str, source: Path) -> bool:
        """Keep the bytes of a file; False where they lay here already. Each writer writes a file of its own."""
        target = self.place / digest
        with contextlib.suppress(OSError):
            if sha256_file(target) == digest:
                os.utime(target)  # counts as new: nobody collects it under the feet of who needs it now
                return False
        made(self.place)
        with atomic_file(target) as temporary:
            if copied(source, temporary) != digest:
                raise RegistryError(f"{source} changed while it was published; publish it again")
        return True

    def fetch(self, digest: str, target: Path) -> None:
        """Write a blob to a new file."""
        place = self._there(digest)
        try:
            found = copied(place, target)
        except OSError as problem:
            raise self._unreadable(place, problem) from None
        if found != digest:
            raise Corrupt(f"{place} was changed after it was published")

    def verify(self, digest: str) -> None:
        """Read a blob through."""
        place = self._there(digest)
        try:
            found = sha256_file(place)
        except OSError as problem:
            raise self._unreadable(place, problem) from None
        if found != digest:
            raise Corrupt(f"{place} was changed after it was published")

    def sweep(self, keep: Collection[str], before: float, dry: bool = False) -> int:
        """Remove what is in no use and was last put before the time `before`."""
        freed = 0
        for path in self.place.glob("*"):
            if path.name in keep:
                continue
            with contextlib.suppress(FileNotFoundError):  # another sweeps as well
                facts = path.stat()
                if facts.st_mtime < before:
                    if not dry:
                        path.unlink()
                    freed += facts.st_size
        return freed

    def _find(self, digest: str) -> Path | None:
        place = self.place / digest
        return place if place.is_file() else format1.blob(self.root, digest)

    def _there(self, digest: str) -> Path:
        place = self._find(digest)
        if place is None:
            raise Corrupt(f"{self.place / digest} cannot be read (it is not there)")
        return place

    def _unreadable(self, place: Path, problem: OSError) -> Exception:
        if problem.filename is not None and Path(problem.filename) == place:
            return Corrupt(f"{place} cannot be read ({problem.strerror})")
        return StorageError(f"{problem.filename or place} could not be written ({problem.strerror or problem})")


def copied(source: Path, target: Path) -> str:
    """Copy a file, and return the SHA-256 of the bytes that were written."""
    digest = hashlib.sha256()
    with open(source, "rb") as reading, open(target, "wb") as writing:
        while chunk := reading.read(CHUNK):
            digest.update(chunk)
            writing.write(chunk)
    return digest.hexdigest()


def made(directory: Path) -> None:
    """Make a directory, durably: a power cut afterwards does not take its name away."""
    if directory.is_dir():
        return
    made(directory.parent)
    directory.mkdir(exist_ok=True)
    handle = os.open(directory.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
