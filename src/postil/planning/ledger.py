"""The ledger of a traced step: every tensor's bytes from birth to death, by the part of the step that made it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# glibc serves blocks up to its largest mmap threshold from one heap and gives little of that back: small blocks
# pin the holes, so it grows beyond what is in use. The factor between the two, measured on SmolLM2-135M with glibc
# 2.36 (bench/plan_memory.py): 1.28 to 1.39 for full fine-tuning and LoRA, 500 to 2,000 tokens, three steps.
HEAP_FACTOR = 4 / 3
HEAP_BLOCK = 32 * 2**20  # bytes; DEFAULT_MMAP_THRESHOLD_MAX of a 64-bit glibc
# What a process takes beside tensors by the end of a first step of 8 tokens: code and tables loaded at first use.
PROCESS = 26_000_000  # bytes of RssAnon, measured likewise
SLACK = "slack"

Bytes = dict[str, int]


@dataclass(slots=True)
class Ledger:
    """Live bytes by part, and per part of the step the state in which most memory was taken.

    heap: whether the process's heap keeps what is freed (glibc, on the CPU); what it holds beyond the live tensors,
    and what the process takes besides, is then part "slack" of a peak. peaks: part → live bytes by part at the moment
    when most was taken within it.
    """

    heap: bool
    part: str = "weights"
    live: Bytes = field(default_factory=dict)
    peaks: dict[str, Bytes] = field(default_factory=dict)
    _known: dict[int, tuple[weakref.ref[torch.UntypedStorage], int, str]] = field(default_factory=dict)
    _total: int = 0
    _in_heap: int = 0
    _heap_high: int = 0
    _tops: Bytes = field(default_factory=dict)

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """What is made within this block belongs to `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def forget_peaks(self) -> None:
        """Begin to watch: what was taken so far was taken before the step."""
        self.peaks, self._tops, self._heap_high = {}, {}, self._in_heap

    def born(self, tensor: torch.Tensor) -> None:
        """Enter a tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known[key] = (weakref.ref(storage, partial(self._died, key)), size, self.part)
        self._add(size, self.part)
        taken = self._total + self._slack
        if taken > self._tops.get(self.part, -1):
            self._tops[self.part] = taken
            self.peaks[self.part] = {**self.live, SLACK: self._slack}

    def belongs(self, tensor: torch.Tensor, part: str) -> None:
        """Move a live tensor's bytes to another part."""
        key = tensor.untyped_storage()._cdata
        if key not in self._known:
            return
        reference, size, before = self._known[key]
        self._known[key] = (reference, size, part)
        self.live[before] -= size
        self.live[part] = self.live.get(part, 0) + size

    @property
    def _slack(self) -> int:
        return max(int(HEAP_FACTOR * self._heap_high) - self._in_heap, 0) + PROCESS if self.heap else 0

    def _died(self, key: int, _reference: object) -> None:
        _, size, part = self._known.pop(key)
        self._add(-size, part)

    def _add(self, size: int, part: str) -> None:
        self._total += size
        self.live[part] = self.live.get(part, 0) + size
        if abs(size) < HEAP_BLOCK and part != "weights":  # the base is loaded before, into blocks of its own
            self._in_heap += size
            self._heap_high = max(self._heap_high, self._in_heap)


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Enters the results of every operation on tensors of `device_type` into a ledger."""

    def __init__(self, ledger: Ledger, device_type: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger, self.device_type = ledger, device_type

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and enter what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == self.device_type:
                self.ledger.born(leaf)
        return out
