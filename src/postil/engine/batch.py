"""Running rows through the model: a changing batch where sequences pack, one after another where not."""

from __future__ import annotations

import inspect
import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from postil.adapter import AdaptedModel
from postil.engine.cache import KeyValueStore
from postil.engine.row import Row
from postil.engine.sampler import choose
from postil.kernels.layout import Layout, Segment, Span, Spans

PREFILL_TOKENS = 2048  # of one pack of prompts, unless a single prompt is longer


def _advance(rows: Sequence[Row], logits: torch.Tensor) -> None:
    choices = choose(logits, [row.request for row in rows], [row.generator for row in rows])
    for row, choice in zip(rows, choices, strict=True):
        row.push(choice)


def spans_of_rows(rows: Sequence[Row], lengths: Sequence[int]) -> Spans:
    """One span per run of rows with the same adapter; none for rows of the base."""
    spans, start = [], 0
    for slot, run in itertools.groupby(zip(rows, lengths, strict=True), key=lambda pair: pair[0].slot):
        end = start + sum(length for _, length in run)
        if slot >= 0:
            spans.append(Span(start, end, slot))
        start = end
    return Spans.of(spans)


class Batch:
    """Continuous batching: running rows lie in cache slots 0, 1, … in batch order, sorted by adapter.

    A step is one forward pass: prompts that fill the free places if any wait, else one token for every
    running row. A finished row leaves at once and the others close ranks.
    """

    def __init__(self, model: AdaptedModel, rows: Iterable[Row], max_batch: int) -> None:
        self.model = model
        self.waiting = deque(rows)
        self.running: list[Row] = []
        self.places = min(max_batch, len(self.waiting))
        self.store = KeyValueStore(self.places, max((row.limit for row in self.waiting), default=0))

    @property
    def busy(self) -> bool:
        """Whether any row is unfinished."""
        return bool(self.waiting or self.running)

    @torch.no_grad()
    def step(self) -> None:
        """One forward pass. Raises what the model raises."""
        if self.waiting and len(self.running) < self.places:
            self._prefill()
        else:
            self._decode()

    def _prefill(self) -> None:
        first = len(self.running)
        rows = [self.waiting.popleft()]
        total = len(rows[0].prompt)
        while self.waiting and first + len(rows) < self.places:
            total += len(self.waiting[0].prompt)
            if total > PREFILL_TOKENS:
                break
            rows.append(self.waiting.popleft())
        rows.sort(key=lambda row: row.slot)
        lengths = [len(row.prompt) for row in rows]
        self.store.reserve(max(lengths), [row.length for row in self.running])
        capacity = self.store.capacity
        ends = list(itertools.accumulate(lengths))
        segments = tuple(
            Segment(end - length, end, slot * capacity, slot * capacity + length)
            for slot, (length, end) in enumerate(zip(lengths, ends, strict=True), first)
        )
        ids = [token for row in rows for token in row.prompt]
        positions = [position for length in lengths for position in range(length)]
        self._forward(rows, ids, positions, segments, lengths)
        self.running += rows
        self._close_ranks()

    def _decode(self) -> None:
        rows = self.running
        lengths = [row.length for row in rows]
        self.store.reserve(max(lengths) + 1, lengths)
        capacity = self.store.capacity
        segments = tuple(
            Segment(slot, slot + 1, slot * capacity, slot * capacity + length + 1)
            for slot, length in enumerate(lengths)
        )
        self._forward(rows, [row.ids[-1] for row in rows], lengths, segments, [1] * len(rows))
        if any(row.finish for row in rows):
            self._close_ranks()

    def _forward(
        self,
        rows: Sequence[Row],
        ids: Sequence[int],
        positions: Sequence[int],
        segments: tuple[Segment, ...],
        lengths: Sequence[int],
    ) -> None:
        """Run the flat batch, store its keys and values, and push each row's next token."""
        device = self.model.base.device
        placed = [(segment.k1 - (segment.q1 - segment.q0), segment.k1) for segment in segments]
        self.store.write_rows = torch.tensor([n for start, end in placed for n in range(start, end)], device=device)
        spans = spans_of_rows(rows, lengths)
        last = [segment.q1 - 1 for segment in segments]
        with self.model.using(Layout(segments, spans, self.store)):
            hidden = self.model.hidden(torch.tensor(ids, device=device), torch.tensor(positions, device=device))
            if len(last) < hidden.shape[0]:
                hidden, spans = hidden[torch.tensor(last, device=device)], spans.take(last)
            logits = self.model.logits(hidden, spans)
        _advance(rows, logits)

    def _close_ranks(self) -> None:
        """Drop finished rows; the rest move to slots 0, 1, … in the order of their adapters."""
        kept = sorted(
            (slot for slot, row in enumerate(self.running) if row.finish is None),
            key=lambda slot: self.running[slot].slot,
        )
        self.running = [self.running[slot] for slot in kept]
        self.store.arrange(kept, max((row.length for row in self.running), default=0))


class OneByOne:
    """For architectures that do not pack: transformers' own forward and cache, one sequence after another."""

    def __init__(self, model: AdaptedModel, rows: Iterable[Row]) -> None:
        self.model = model
        self.waiting = deque(rows)
        self.cache: Any = None
        keeps = "logits_to_keep" in inspect.signature(model.model.forward).parameters
        self.options = {"logits_to_keep": 1} if keeps else {}

    @property
    def busy(self) -> bool:
        """Whether any row is unfinished."""
        return bool(self.waiting)

    @torch.no_grad()
    def step(self) -> None:
        """One forward pass of the first unfinished row."""
        row = self.waiting[0]
        new = row.ids[-1:] if self.cache is not None else []  # without a cache, all of it again
        ids = torch.tensor([new or [*row.prompt, *row.ids]], device=self.model.base.device)
        before = self.model.active
        self.model.activate(*([row.request.adapter] if row.request.adapter is not None else []))
        try:
            out = self.model.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **self.options)
        finally:
            self.model.active = before
        self.cache = getattr(out, "past_key_values", None)
        _advance([row], out.logits[0, -1:])
        if row.finish:
            self.waiting.popleft()
            self.cache = None
