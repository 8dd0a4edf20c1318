"""What a bare base said, to a judging or to a training that holds to it, kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import version
from typing import Any, TypeVar

import torch

from postil.base import Base
from postil.base.cache import cache_directory
from postil.errors import StorageError
from postil.files import write_text
from postil.kernels.dense import instructions

Value = TypeVar("Value")

_FORMAT = "5"  # of the values kept
_VERSIONS = ("postil", "torch", "transformers")


class Memory:
    """The values of one base, by what was asked; None, or a base that was not read from files, keeps nothing.

    A value is found again only where the base's bytes, form and tokenizer, the versions, the device, its instructions
    and the number of threads are the same, so that it is what asking again would give. fresh: ask again and keep
    that.
    """

    def __init__(self, base: Base | None, *, fresh: bool = False) -> None:
        self._fresh = fresh
        self._told = ""
        if base is not None and base.as_stored and (base.directory is not None or base.file is not None):
            fingerprint = base.fingerprint()
            told = [_FORMAT, fingerprint.source, fingerprint.form, str(base.dtype), _tokenizer(base)]
            told += [f"{name} {version(name)}" for name in _VERSIONS]
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
        digest = hashlib.sha256(f"{kind}\n{self._told}\n".encode())
        for one in asked:
            digest.update(len(one).to_bytes(8, "little") + one)
        path = cache_directory() / "judged" / f"{digest.hexdigest()}.json"
        if not self._fresh:
            with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # none there, or spoilt
                return read(json.loads(path.read_text(encoding="utf-8")))
        value = make()
        with suppress(StorageError):  # what cannot be kept is asked again
            write_text(path, json.dumps(value))
        return read(value)


def _tokenizer(base: Base) -> str:
    """A digest of how the base's text becomes tokens and back."""
    inner = getattr(base.tokenizer, "backend_tokenizer", None)
    told = inner.to_str() if inner is not None else repr(sorted(base.tokenizer.get_vocab().items()))
    return hashlib.sha256(told.encode()).hexdigest()
