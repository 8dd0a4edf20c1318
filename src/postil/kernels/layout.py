"""What one forward pass knows about its flat row of tokens: spans (adapters) and segments (sequences)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int

from postil.errors import InternalError


@dataclass(frozen=True, slots=True)
class Span:
    """Rows `start`..`end` of the batch use the adapter in `slot`, its term multiplied by `scale`.

    The adapter's own alpha/r lies in its bank; `scale` is the weight of a combination (1 alone).
    `seed` names the dropout masks of these rows, 0: none (only read where the slot has dropout).
    """

    start: int
    end: int
    slot: int
    scale: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Which row of its whole step each row of a batch is (int64 [rows]): what dropout's masks are counted by, so that
    they do not depend on how the step is split into packs, sequences or chunks. Equal to itself alone."""

    numbers: Int[torch.Tensor, " rows"]


@dataclass(frozen=True, slots=True)
class Spans:
    """The spans of one forward pass. Rows in no span get the base alone; spans may overlap.

    rows: None where the batch's own rows 0, 1, … are the step's.
    """

    items: tuple[Span, ...] = ()
    rows: Rows | None = None

    @classmethod
    def of(cls, items: Iterable[Span], rows: Rows | None = None) -> Spans:
        """Spans without the empty ones."""
        return cls(tuple(item for item in items if item.end > item.start), rows)

    def numbers(self, span: Span, device: torch.device) -> Int[torch.Tensor, " n"]:
        """The numbers of a span's rows in the whole step, int64 on `device`."""
        if self.rows is None:
            return torch.arange(span.start, span.end, device=device)
        return self.rows.numbers[span.start : span.end].to(device)

    def take(self, rows: Sequence[int] | np.ndarray) -> Spans:
        """The spans of a batch made of the given rows (ascending) of this one."""
        index = np.asarray(rows, dtype=np.int64)
        taken = (
            replace(
                item,
                start=int(np.searchsorted(index, item.start, side="left")),
                end=int(np.searchsorted(index, item.end, side="left")),
            )
            for item in self.items
        )
        return Spans.of(taken, self._chosen(torch.from_numpy(index)))

    def within(self, start: int, end: int) -> Spans:
        """The spans of rows `start`..`end` alone, counted from `start`."""
        cut = (
            replace(item, start=max(item.start, start) - start, end=min(item.end, end) - start) for item in self.items
        )
        return Spans.of(cut, self._chosen(torch.arange(start, end)))

    def _chosen(self, index: Int[torch.Tensor, " n"]) -> Rows | None:
        """The step's rows of the batch's rows `index`; None where no span has dropout."""
        if not any(item.seed for item in self.items):
            return None
        return Rows(index if self.rows is None else self.rows.numbers[index.to(self.rows.numbers.device)])

    def check(self, rows: int) -> None:
        """Raise InternalError when a span lies outside a batch of `rows` rows."""
        for item in self.items:
            if not 0 <= item.start < item.end <= rows:
                raise InternalError(f"span {item.start}..{item.end} does not fit a batch of {rows} rows")


@dataclass(frozen=True, slots=True)
class Segment:
    """Queries `q0`..`q1` see keys `k0`..`k1`, causally, the last query the last key.

    `prefix` are ranges of keys that stand, in their order, directly before `k0` (beginnings shared with other
    segments): the segment's keys are those and its own, one sequence, over which a window counts.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    prefix: tuple[tuple[int, int], ...] = ()

    @property
    def ahead(self) -> int:
        """The number of keys before the segment's own."""
        return sum(end - start for start, end in self.prefix)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """The segment's rows of keys or values [keys, ...], those of its prefix first."""
        own = x[self.k0 : self.k1]
        return torch.cat([*(x[start:end] for start, end in self.prefix), own]) if self.prefix else own


class KeyValueStore(Protocol):
    """Where keys and values of earlier tokens lie; segments' key ranges are rows of what `extend` returns."""

    def extend(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store this pass's keys and values [tokens, kv_heads, head_dim]; return all rows of the layer."""


@dataclass(frozen=True, slots=True)
class Layout:
    """All that one forward pass over a flat batch needs beside its token ids and positions."""

    segments: tuple[Segment, ...]
    spans: Spans = field(default_factory=Spans)
    store: KeyValueStore | None = None

    @classmethod
    def packed(
        cls, lengths: Sequence[int], spans: Spans | None = None, before: Sequence[int | None] | None = None
    ) -> Layout:
        """Whole sequences of the given lengths, one after another, each seeing itself alone.

        before: for each the earlier one that it continues (None: it begins by itself), so that a beginning of
        several is there once.
        """
        segments: list[Segment] = []
        start = 0
        for length, earlier in zip(lengths, before or [None] * len(lengths), strict=True):
            first = None if earlier is None else segments[earlier]
            prefix = () if first is None else (*first.prefix, (first.k0, first.k1))
            segments.append(Segment(start, start + length, start, start + length, prefix))
            start += length
        return cls(tuple(segments), spans or Spans())

    @property
    def tokens(self) -> int:
        """The number of rows of the batch."""
        return self.segments[-1].q1 if self.segments else 0


def positions_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Int[torch.Tensor, " tokens"]:
    """int64 positions that start again at 0 with every sequence."""
    if not len(lengths):
        return torch.zeros(0, dtype=torch.int64, device=device)
    return torch.cat([torch.arange(length, device=device) for length in lengths])
