"""Atomic writes: a temporary name in the same directory, fsync, rename; nothing half-written stays."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from postil.errors import StorageError

_TEMPORARY = ".postil-tmp-"
_OLD = ".postil-old-"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")  # a loader would mix them with new ones


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f"{_TEMPORARY}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def _fsync(path: Path) -> None:
    """Flush one file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_folder(folder: Path) -> None:
    """Make a folder and those it lies in, each new name flushed to the disk."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(new):
        _fsync(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists() or path.is_symlink():
        path.unlink()


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it becomes `path`, on any error it is removed.

    Raises StorageError, naming `path`, when the system refuses (disk full, no permission).
    """
    target = Path(path)
    temporary = _temporary_beside(target)
    try:
        _make_folder(target.parent)
        yield temporary
        _fsync(temporary)
        os.replace(temporary, target)
        _fsync(target.parent)
    except OSError as error:
        _remove(temporary)
        raise _storage_error(target, error) from error
    except BaseException:
        _remove(temporary)
        raise


@contextmanager
def atomic_directory(path: str | Path, *, marker: str | None = None, carry: bool = False) -> Iterator[Path]:
    """As atomic_file, for a directory: written beside, every file synced, then put at `path` in one move.

    An existing directory is replaced only where it is empty, or holds the file `marker` and no folder: what
    postil wrote itself. carry: files in it that are not written anew go with it, but for shards of older weights.
    Where the system can exchange two names, a reader finds the old or the new one at every moment; elsewhere a
    kill between two renames is mended by `remove_leftovers`.
    """
    target = Path(path)
    if not (marker is not None and _is_own(target, marker)):
        check_vacant(target)
    temporary = _temporary_beside(target)
    try:
        _make_folder(target.parent)
        temporary.mkdir()
        yield temporary
        if carry and target.is_dir():
            for inner in target.iterdir():
                ours = (temporary / inner.name).exists() or _WEIGHTS.fullmatch(inner.name)
                if not ours and (inner.is_symlink() or inner.is_file()):
                    shutil.copy2(inner, temporary / inner.name, follow_symlinks=False)
        for inner in sorted(temporary.rglob("*"), reverse=True):
            if not inner.is_symlink():
                _fsync(inner)
        _fsync(temporary)
        old = _put(temporary, target)
        _fsync(target.parent)
        if old is not None:
            _remove(old)  # only now: the new one's name is on the disk
    except OSError as error:
        _remove(temporary)
        raise _storage_error(target, error) from error
    except BaseException:
        _remove(temporary)
        raise


def _is_own(target: Path, marker: str) -> bool:
    return (target / marker).is_file() and not any(inner.is_dir() for inner in target.iterdir())


def _put(temporary: Path, target: Path) -> Path | None:
    """Give `temporary` the name `target`; returns the name that what stood there has now, if anything did."""
    if not target.exists():
        os.replace(temporary, target)
        return None
    if _exchange(temporary, target):
        return temporary
    old = target.with_name(f"{_OLD}{target.name}")
    _remove(old)
    os.replace(target, old)
    os.replace(temporary, target)
    return old


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names at once (Linux renameat2, RENAME_EXCHANGE); False where that cannot be done."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    if call is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return int(call(here, os.fsencode(first), here, os.fsencode(second), exchange)) == 0


def _storage_error(target: Path, error: OSError) -> StorageError:
    while isinstance(error, StorageError) and isinstance(error.__cause__, OSError):
        error = error.__cause__  # a file within a directory: the directory is what the user named
    reason = error.strerror or str(error)
    return StorageError(
        f"{target} could not be written ({reason}); nothing half-written was left. "
        "Free some space or choose another directory, and run it again."
    )


def check_vacant(path: str | Path) -> None:
    """Raise StorageError where a directory cannot be made at `path` without removing what lies there."""
    target = Path(path)
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        kind = "a directory with files in it" if target.is_dir() else "a file"
        raise StorageError(f"{target} is {kind} already; nothing was written, name a new directory")


def remove_leftovers(directory: str | Path) -> int:
    """Remove what writers killed inside `directory` left under temporary names; returns how many.

    A directory that was moved aside for a new one that never came gets its name back first.
    """
    for old in Path(directory).glob(f"{_OLD}*"):
        target = old.with_name(old.name.removeprefix(_OLD))
        if not target.exists():
            os.replace(old, target)
        else:
            _remove(old)
    left = list(Path(directory).glob(f"{_TEMPORARY}*"))
    for path in left:
        _remove(path)
    return len(left)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically, indented by 2, keys sorted, so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
