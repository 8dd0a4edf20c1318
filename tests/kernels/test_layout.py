"""Spans and layouts: taking rows, cutting, numbers of rows, checks, packed sequences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postil.errors import InternalError
from postil.kernels.layout import Layout, Rows, Segment, Span, Spans, positions_of

ROWS = 12
SPANS = st.lists(
    st.builds(
        lambda a, b, slot, scale: Span(min(a, b), max(a, b), slot, scale, seed=slot + 7),
        st.integers(0, ROWS),
        st.integers(0, ROWS),
        st.integers(0, 3),
        st.sampled_from([1.0, -0.5]),
    ),
    max_size=5,
).map(Spans.of)


def per_row(spans: Spans, rows: int) -> list[list[tuple[int, float, int]]]:
    """For each row, what applies to it."""
    return [
        [(item.slot, item.scale, item.seed) for item in spans.items if item.start <= row < item.end]
        for row in range(rows)
    ]


def test_of_leaves_out_empty_spans() -> None:
    full = Span(1, 3, 0)
    assert Spans.of([Span(2, 2, 0), full, Span(4, 3, 1)]).items == (full,)


@given(SPANS, st.sets(st.integers(0, ROWS - 1), min_size=1), st.integers(0, ROWS), st.integers(0, ROWS))
def test_rows_keep_their_numbers_when_taken_and_cut(spans: Spans, chosen: set[int], a: int, b: int) -> None:
    """Of a step's row 30 + 2i each, whatever batch of its rows they are put in."""
    numbers = torch.arange(30, 30 + 2 * ROWS, 2)
    for origin in (None, Rows(numbers)):
        whole = Spans(spans.items, origin)
        known = torch.arange(ROWS) if origin is None else numbers
        rows = sorted(chosen)
        taken = whole.take(rows)
        start, end = min(a, b, len(rows)), min(max(a, b), len(rows))
        for part, mine in ((taken, known[rows]), (taken.within(start, end), known[rows[start:end]])):
            for item in part.items:
                assert part.numbers(item, torch.device("cpu")).tolist() == mine[item.start : item.end].tolist()


@given(SPANS, st.sets(st.integers(0, ROWS - 1)))
def test_take_keeps_what_applies_to_each_taken_row(spans: Spans, chosen: set[int]) -> None:
    rows = sorted(chosen)
    before = per_row(spans, ROWS)
    for index in (rows, np.array(rows, dtype=np.int32)):
        taken = spans.take(index)
        taken.check(len(rows))
        assert per_row(taken, len(rows)) == [before[row] for row in rows]


@given(SPANS, st.integers(0, ROWS), st.integers(0, ROWS))
def test_within_keeps_what_applies_to_each_row_of_the_range(spans: Spans, a: int, b: int) -> None:
    start, end = min(a, b), max(a, b)
    cut = spans.within(start, end)
    cut.check(end - start)
    assert per_row(cut, end - start) == per_row(spans, ROWS)[start:end]


@pytest.mark.parametrize("span", [Span(-1, 2, 0), Span(0, 6, 0), Span(3, 3, 0), Span(4, 2, 0)])
def test_check_names_the_span_that_does_not_fit(span: Span) -> None:
    with pytest.raises(InternalError, match=f"span {span.start}..{span.end} "):
        Spans((Span(0, 1, 0), span)).check(5)


def test_check_accepts_the_whole_batch_and_overlap() -> None:
    Spans((Span(0, 5, 0), Span(4, 5, 1))).check(5)


def test_packed() -> None:
    layout = Layout.packed([3, 1, 2])
    assert layout.segments == (Segment(0, 3, 0, 3), Segment(3, 4, 3, 4), Segment(4, 6, 4, 6))
    assert layout.tokens == 6
    assert layout.spans == Spans()
    assert layout.store is None
    spans = Spans((Span(0, 2, 0),))
    assert Layout.packed([2], spans).spans is spans
    assert Layout.packed([]).tokens == 0


def test_positions_restart_with_every_sequence() -> None:
    assert positions_of([3, 1, 2]).tolist() == [0, 1, 2, 0, 0, 1]
    empty = positions_of([])
    assert empty.shape == (0,)
    assert empty.dtype == positions_of([2]).dtype == torch.int64
