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


def _fail_without_adapter(model: AdaptedModel, rows: Iterable[Row]) -> None:
    """Break off the rows whose adapter was removed: their slot is nobody's now."""
    for row in rows:
        if row.slot >= 0 and not model.holds(row.slot):
            row.fail(f"the adapter {row.request.adapter!r} was removed while its answer was being written: ask again")


def adapter_spans(rows: Sequence[Row], lengths: Sequence[int]) -> Spans:
    """One span per run of rows with the same adapter; none for rows of the base."""
    spans, start = [], 0
    for slot, run in itertools.groupby(zip(rows, lengths, strict=True), key=lambda pair: pair[0].slot):
        end = start + sum(length for _, length in run)
        if slot >= 0:
            spans.append(Span(start, end, slot))
        start = end
    return Spans.of(spans)


class Batch:
    """Continuous batching: rows run sorted by adapter, each with its own keys and values in the store.

    A step is one forward pass: prompts that fill the free places if any wait, else one token for every
    running row. A finished row leaves at once, and one that breaks off, alone.
    """

    def __init__(self, model: AdaptedModel, rows: Iterable[Row], max_batch: int) -> None:
        self.model = model
        self.waiting = deque(rows)
        self.running: list[Row] = []
        self.places = min(max_batch, len(self.waiting))
        self.store = KeyValueStore()

    @property
    def busy(self) -> bool:
        """Whether any row is unfinished."""
        return bool(self.waiting or self.running)

    @torch.no_grad()
    def step(self) -> None:
        """One forward pass, in the model's turn. Raises what the model raises."""
        with self.model.turn:
            _fail_without_adapter(self.model, [*self.running, *self.waiting])
            self.waiting = deque(row for row in self.waiting if row.finish is None)
            self._close_ranks()
            if self.waiting and len(self.running) < self.places:
                self._prefill()
            elif self.running:
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
        self.running += rows
        self._reserve([*[row.length for row in self.running[:first]], *[0] * len(rows)], first)
        ids = [token for row in rows for token in row.prompt]
        positions = [position for length in lengths for position in range(length)]
        self._forward(rows, ids, positions, lengths, self.store.starts[first:])
        self._close_ranks()

    def _decode(self) -> None:
        rows = self.running
        lengths = [row.length for row in rows]
        self._reserve(lengths, len(rows))
        self._forward(rows, [row.ids[-1] for row in rows], lengths, [1] * len(rows), self.store.starts)
        if any(row.finish for row in rows):
            self._close_ranks()

    def _reserve(self, used: Sequence[int], decoding: int) -> None:
        """Room for one more token of the rows that decode, and for the prompts of those after them."""
        needed = [
            length + 1 if n < decoding else len(row.prompt)
            for n, (row, length) in enumerate(zip(self.running, used, strict=True))
        ]
        self.store.reserve(used, needed, [row.limit for row in self.running])

    def _forward(
        self,
        rows: Sequence[Row],
        ids: Sequence[int],
        positions: Sequence[int],
        lengths: Sequence[int],
        starts: Sequence[int],
    ) -> None:
        """Run the flat batch, store its keys and values, and push each row's next token.

        lengths: new tokens of each row; starts: the first row of each in the store.
        """
        device = self.model.base.device
        segments, written, first = [], list[int](), 0
        for length, start in zip(lengths, starts, strict=True):
            end = start + positions[first + length - 1] + 1
            segments.append(Segment(first, first + length, start, end))
            written += range(end - length, end)
            first += length
        self.store.write_rows = torch.tensor(written, device=device)
        spans = adapter_spans(rows, lengths)
        last = [segment.q1 - 1 for segment in segments]
        with self.model.using(Layout(tuple(segments), spans, self.store)):
            hidden = self.model.hidden(torch.tensor(ids, device=device), torch.tensor(positions, device=device))
            if len(last) < hidden.shape[0]:
                hidden, spans = hidden[torch.tensor(last, device=device)], spans.take(last)
            logits = self.model.logits(hidden, spans)
        _advance(rows, logits)

    def _close_ranks(self) -> None:
        """Drop finished rows; the rest run on in the order of their adapters."""
        kept = sorted(
            (n for n, row in enumerate(self.running) if row.finish is None), key=lambda n: self.running[n].slot
        )
        self.running = [self.running[n] for n in kept]
        self.store.keep(kept)


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
        """One forward pass of the first unfinished row, in the model's turn."""
        with self.model.turn:
            row = self.waiting[0]
            _fail_without_adapter(self.model, [row])
            if row.finish is None:
                self._forward(row)
            if row.finish:
                self.waiting.popleft()
                self.cache = None

    def _forward(self, row: Row) -> None:
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
