"""What a base, or an adapter on it, said: kept in the user's cache as it comes, so it is said once."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from postil.adapter import AdaptedModel
from postil.base import Base
from postil.base.cache import cache_directory
from postil.engine.request import Request, prompt_ids
from postil.errors import StorageError
from postil.files import write_text
from postil.kernels.dense import instructions

Value = TypeVar("Value")
Keep = Callable[[int, Any], None]  # a place and its JSON value

MOST_BYTES = 1 << 29  # kept in all; what was not asked for longest goes first
_FORMAT = "6"  # of the values kept
_VERSIONS = ("postil", "torch", "transformers")
_CODE = ("adapter", "base", "data", "engine", "judging", "kernels")  # folders that the values come of
_SPOILT = (OSError, ValueError, LookupError, TypeError, AttributeError)


class Memory:
    """The values of one base, by what was asked; None, or a base that was not read from files, keeps nothing.

    A value is found again only where the base's bytes, form and tokenizer, the versions and postil's own code, the
    device, its instructions and the number of threads are the same, so that it is what asking again would give.
    of: what answers on the base, by its digest; empty for the bare base. fresh: ask again and keep that.
    """

    def __init__(self, base: Base | None, *, of: str = "", fresh: bool = False) -> None:
        self._fresh = fresh
        self._told = ""
        if base is not None and base.as_stored and (base.directory is not None or base.file is not None):
            fingerprint = base.fingerprint()
            told = [_FORMAT, fingerprint.source, fingerprint.form, str(base.dtype), _tokenizer(base), of]
            told += [f"{name} {version(name)}" for name in _VERSIONS]
            told += [code_digest(Path(__file__).parents[1])]
            told += [str(base.device), instructions(), str(torch.get_num_threads())]
            if base.device.type == "cuda":
                told += [torch.cuda.get_device_name(base.device), str(torch.version.cuda)]
            told.append(torch.get_float32_matmul_precision())
            self._told = "\n".join(told)

    def __call__(
        self, kind: str, asked: Iterable[bytes], make: Callable[[], Any], read: Callable[[Any], Value]
    ) -> Value:
        """What is kept for `asked`, or else what `make` gives now. kind: what the value is, a word; read: makes the
        value of the JSON that `make` gives."""
        if not self._told:
            return read(make())
        path = self._path(kind, asked, "json")
        if not self._fresh:
            with suppress(*_SPOILT):  # none there, or spoilt
                value = read(json.loads(path.read_text(encoding="utf-8")))
                _used(path)
                return value
        made = make()
        with suppress(StorageError):  # what cannot be kept is asked again
            write_text(path, json.dumps(made))
            bound(MOST_BYTES)
        return read(made)

    def each(
        self,
        kind: str,
        asked: Sequence[bytes],
        make: Callable[[Sequence[int], Keep], None],
        read: Callable[[Any], Value],
        tell: Callable[[int, Value], None] = lambda _, __: None,
    ) -> list[Value]:
        """The value of each of `asked`, in order: what is kept, and of the other places what `make` hands to Keep,
        which is in the cache at once. So whoever is stopped half way has lost nothing. tell: told each as it is
        known.
        """
        found: dict[int, Value] = {}
        path = self._path(kind, asked, "jsonl") if self._told else None
        if path is not None and not self._fresh:
            for place, value in _lines(path):
                with suppress(*_SPOILT):
                    found[place] = read(value)
        found = {place: value for place, value in found.items() if 0 <= place < len(asked)}
        for place, value in found.items():
            tell(place, value)
        left = [place for place in range(len(asked)) if place not in found]
        if left:
            with _journal(path, anew=self._fresh) as write:

                def keep(place: int, value: Any) -> None:
                    write(json.dumps([place, value]))
                    found[place] = read(value)
                    tell(place, found[place])

                make(left, keep)
            bound(MOST_BYTES)
        elif path is not None:
            _used(path)
        return [found[place] for place in range(len(asked))]

    def _path(self, kind: str, asked: Iterable[bytes], suffix: str) -> Path:
        digest = hashlib.sha256(f"{kind}\n{self._told}\n".encode())
        for one in asked:
            digest.update(len(one).to_bytes(8, "little") + one)
        return place() / f"{digest.hexdigest()}.{suffix}"


def asked_of(request: Request, number: int, model: AdaptedModel) -> bytes:
    """What a request asks, whoever answers: its tokens and how an answer is generated."""
    ids = prompt_ids(request, number, model.base.tokenizer)
    how = replace(request, ids=None, prompt=None, messages=None, tools=None, adapter=None, label="")
    return repr((ids, how)).encode()


def place() -> Path:
    """The directory where it is kept."""
    return cache_directory() / "judged"


def kept() -> list[Path]:
    """What is kept, the longest unused first."""
    found = list(place().glob("*.json*")) if place().is_dir() else []
    return sorted(found, key=lambda path: path.stat().st_mtime)


def bound(most: int) -> int:
    """Forget what was not used for longest, until the rest is at most so many bytes; returns how many files went."""
    gone = 0
    with suppress(OSError):  # another judging may do the same
        files = kept()
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total <= most:
                break
            total -= path.stat().st_size
            path.unlink()
            gone += 1
    return gone


@functools.cache
def code_digest(root: Path) -> str:
    """A digest of the code that values come of: in a development checkout it changes without its version."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in _CODE for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


@contextmanager
def _journal(path: Path | None, *, anew: bool) -> Iterator[Callable[[str], None]]:
    """Yield what appends a line to a file, each with the system at once; nothing is written where that is refused."""
    handle = None
    if path is not None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if anew:
                path.unlink(missing_ok=True)
            handle = path.open("a", encoding="utf-8")

    def write(line: str) -> None:
        if handle is not None:
            with suppress(OSError):
                handle.write(f"\n{line}\n")  # after whatever a kill left of the line before
                handle.flush()

    try:
        yield write
    finally:
        if handle is not None:
            with suppress(OSError):
                handle.close()


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The (place, value) of every whole line; none where there is no file."""
    with suppress(OSError):
        for line in path.read_bytes().splitlines():
            with suppress(*_SPOILT):
                number, value = json.loads(line)
                yield int(number), value


def _used(path: Path) -> None:
    with suppress(OSError):
        os.utime(path)


def _tokenizer(base: Base) -> str:
    """A digest of how the base's text becomes tokens and back."""
    inner = getattr(base.tokenizer, "backend_tokenizer", None)
    told = inner.to_str() if inner is not None else repr(sorted(base.tokenizer.get_vocab().items()))
    return hashlib.sha256(told.encode()).hexdigest()
