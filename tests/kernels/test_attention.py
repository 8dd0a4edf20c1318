"""attention against its reference: segments, windows, caps, sinks, prefixes, chunks and decoding."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postil.kernels.attention import attention
from postil.kernels.attention.reference import attention_reference
from postil.kernels.layout import Layout, Segment

DIM, SCALE = 8, 0.35


def make(
    queries: int, keys: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(queries * 1009 + keys)
    shapes = [(queries, heads, DIM), (keys, kv_heads, DIM), (keys, kv_heads, DIM)]
    return tuple(torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)  # type: ignore[return-value]


def run(function: Any, tensors: list[torch.Tensor], segments: list[Segment], **options: Any) -> list[torch.Tensor]:
    """The output and the gradients of q, k, v and, where given, sinks."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    if len(leaves) == 4:
        options["sinks"] = leaves[3]
    out = function(*leaves[:3], segments, scale=SCALE, **options)
    if not len(out):  # nothing to differentiate
        assert out.shape == tensors[0].shape
        return [out.detach()]
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    grads = torch.autograd.grad((out.float() * direction).sum(), leaves, allow_unused=True)
    return [out, *(torch.zeros_like(i) if g is None else g for i, g in zip(leaves, grads, strict=True))]


def assert_same(tensors: Any, segments: list[Segment], tolerance: float = 1e-5, **options: Any) -> None:
    got = run(attention, list(tensors), segments, **options)
    expected = run(attention_reference, list(tensors), segments, **options)
    for value, want in zip(got, expected, strict=True):
        assert value.dtype == want.dtype
        size = max(1.0, want.abs().max().item()) if want.numel() else 1.0
        torch.testing.assert_close(value, want, rtol=tolerance, atol=tolerance * size)


def packed(*lengths: int) -> list[Segment]:
    return list(Layout.packed(lengths).segments)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Segment], int, dict[str, Any], bool]:
    """Segments, each with queries <= keys, on key ranges after `lead` rows that a prefix may use."""
    lead = draw(st.integers(0, 3))
    segments, q, k = [], 0, lead
    for _ in range(draw(st.integers(0, 4))):
        queries = draw(st.integers(0, 9))
        keys = queries + draw(st.integers(0, 6))
        middle = draw(st.integers(0, lead))
        prefix = draw(st.sampled_from([(), ((0, lead),), ((0, middle), (middle, lead))])) if lead else ()
        segments.append(Segment(q, q + queries, k, k + keys, prefix))
        q, k = q + queries, k + keys + draw(st.integers(0, 2))
    options = {
        "window": draw(st.sampled_from([None, 1, 3, 50])),
        "softcap": draw(st.sampled_from([None, None, 2.0])),
    }
    return segments, k, options, draw(st.booleans())


@settings(max_examples=80, deadline=None)
@given(cases(), st.sampled_from([(4, 2), (3, 3), (4, 1)]))
def test_equals_the_reference(case: tuple[list[Segment], int, dict[str, Any], bool], heads: tuple[int, int]) -> None:
    segments, keys, options, with_sinks = case
    tensors = [*make(segments[-1].q1 if segments else 0, keys, *heads)]
    if with_sinks:
        tensors.append(torch.linspace(-1, 2, heads[0]))
    assert_same(tensors, segments, **options)


@pytest.mark.parametrize("window", [None, 4, 40])
@pytest.mark.parametrize("lengths", [(1,), (17,), (3, 1, 20, 2), (1, 1, 1), (5, 0, 4), (0,), ()])
def test_packed_sequences(lengths: tuple[int, ...], window: int | None) -> None:
    assert_same(make(sum(lengths), sum(lengths)), packed(*lengths), window=window)


@pytest.mark.parametrize(
    ("window", "softcap", "sinks", "queries"),
    [
        (100, None, False, 600),
        (100, 3.0, True, 600),
        (None, 3.0, False, 600),
        (None, None, False, 520),
        (100, None, False, 520),
    ],
)
def test_blocks_of_queries(window: int | None, softcap: float | None, sinks: bool, queries: int) -> None:
    tensors = [*make(queries, 603, 2, 1)]
    if sinks:
        tensors.append(torch.tensor([0.5, -0.5]))
    assert_same(tensors, [Segment(0, queries, 3, 603)], window=window, softcap=softcap)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}])
@pytest.mark.parametrize("window", [None, 3, 20, 304])
def test_a_prefix_stands_before_the_segments_own_keys(window: int | None, options: dict[str, Any]) -> None:
    """The last 300 of 305 queries of one sequence, its first five keys lying elsewhere, see what they always saw."""
    q, k, v = make(305, 305, 2, 1)
    whole = attention_reference(q, k, v, packed(305), scale=SCALE, window=window, **options)
    holes = [torch.full_like(part[:7], 9.0) for part in (k, v)]
    moved = [torch.cat([part[3:5], hole, part[:3], part[5:]]) for part, hole in zip((k, v), holes, strict=True)]
    rest = [Segment(0, 300, 12, 312, prefix=((9, 12), (0, 2)))]
    found = attention(q[5:], *moved, rest, scale=SCALE, window=window, **options)
    torch.testing.assert_close(found, whole[5:], rtol=1e-4, atol=1e-5)
    assert_same((q[5:], *moved), rest, window=window, **options)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 7), st.none() | st.integers(0, 20)), max_size=8),
    st.sampled_from([None, 1, 4, 30]),
    st.sampled_from([None, None, 2.0]),
)
def test_a_pack_of_shared_beginnings(
    parts: list[tuple[int, int | None]], window: int | None, softcap: float | None
) -> None:
    """Each part continues an earlier one or begins by itself; its rows are those of the whole sequence alone."""
    lengths = [length for length, _ in parts]
    before = [earlier % n if n and earlier is not None else None for n, (_, earlier) in enumerate(parts)]
    segments = list(Layout.packed(lengths, before=before).segments)
    assert_same(make(sum(lengths), sum(lengths)), segments, window=window, softcap=softcap)
    q, k, v = make(sum(lengths), sum(lengths))
    found = attention(q, k, v, segments, scale=SCALE, window=window, softcap=softcap)
    starts = [0, *itertools.accumulate(lengths)]
    for index in range(len(parts)):
        chain: list[int] = []
        place: int | None = index
        while place is not None:
            chain = [*range(starts[place], starts[place + 1]), *chain]
            place = before[place]
        alone = attention_reference(
            q[chain], k[chain], v[chain], packed(len(chain)), scale=SCALE, window=window, softcap=softcap
        )
        own = found[starts[index] : starts[index + 1]]
        torch.testing.assert_close(own, alone[len(chain) - len(own) :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_summed_in_float32_and_rounded_once(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Whole sequences, parts of longer ones, one row that decodes, several: all as near as one rounding allows."""
    once = torch.finfo(dtype).eps
    for queries, segments in (
        (12, packed(5, 7)),
        (9, [Segment(0, 5, 0, 40), Segment(5, 9, 41, 300)]),
        (1, [Segment(0, 1, 3, 300)]),
        (3, [Segment(0, 1, 0, 5), Segment(1, 2, 6, 12), Segment(2, 3, 20, 300)]),
    ):
        q, k, v = make(queries, segments[-1].k1, dtype=dtype)
        with torch.no_grad():
            got = attention(q, k, v, segments, scale=SCALE, **options)
        want = attention_reference(q.double(), k.double(), v.double(), segments, scale=SCALE, **options).float()
        torch.testing.assert_close(got.float(), want, rtol=once, atol=1e-6)
        assert_same((q, k, v), segments, tolerance=1e-2, **options)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_decodes_alone_as_among_others(dtype: torch.dtype, window: int | None) -> None:
    """To the last bit but for the order of a float32 sum, which seldom shows where the dtype is coarser."""
    lengths = [3, 200, 17, 64, 129, 128, 300, 1, 90]
    edges = [0, *itertools.accumulate(lengths)]
    q, k, v = make(len(lengths), edges[-1], 6, 2, dtype=dtype)
    segments = [Segment(n, n + 1, edges[n], edges[n + 1]) for n in range(len(lengths))]
    together = attention(q, k, v, segments, scale=SCALE, window=window)
    backwards = attention(
        q.flip(0), k, v, [Segment(n, n + 1, s.k0, s.k1) for n, s in enumerate(segments[::-1])], scale=SCALE,
        window=window,
    ).flip(0)  # fmt: skip
    alone = [
        attention(q[n : n + 1], k, v, [Segment(0, 1, s.k0, s.k1)], scale=SCALE, window=window)
        for n, s in enumerate(segments)
    ]
    for found in (backwards, torch.cat(alone)):
        torch.testing.assert_close(found, together, rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert dtype == torch.float32 or (found != together).float().mean() <= 0.01


@pytest.mark.parametrize("case", ["soft cap", "sinks", "soft cap after a prefix", "soft cap and window"])
def test_nothing_of_the_size_of_the_scores_is_kept_for_the_backward_pass(case: str) -> None:
    tokens = 600
    tensors = [part.requires_grad_() for part in make(tokens, tokens, 4, 2)]
    options: dict[str, Any] = {"softcap": 3.0} if case.startswith("soft cap") else {}
    options |= {"window": 250} if case.endswith("window") else {}
    if case == "sinks":
        options["sinks"] = torch.zeros(4, requires_grad=True)
    before = [None, 0] if case.endswith("prefix") else None
    segments = Layout.packed([tokens] if before is None else [300, 300], before=before).segments
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = attention(*tensors, list(segments), scale=SCALE, **options)
    inputs = sum(part.nbytes for part in tensors) + 16
    assert sum(kept.values()) <= inputs < tokens * tokens
    out.sum().backward()
    assert all(part.grad is not None for part in tensors)


def test_chunks_of_queries_equal_the_whole() -> None:
    q, k, v = make(14, 14)
    whole = attention(q, k, v, packed(14), scale=SCALE, window=5)
    chunks = [
        attention(q[start:end], k, v, [Segment(0, end - start, 0, end)], scale=SCALE, window=5)
        for start, end in [(0, 4), (4, 5), (5, 14)]
    ]
    torch.testing.assert_close(torch.cat(chunks), whole, rtol=1e-5, atol=1e-5)


def test_by_hand() -> None:
    """With equal scores a row is the mean of the values it sees; a sink of the same score counts as a zero."""
    v = torch.tensor([1.0, 3.0, 8.0])[:, None, None].expand(3, 1, DIM)
    zeros = torch.zeros(3, 1, DIM)

    def rows(**options: Any) -> list[float]:
        return attention(zeros, zeros, v, packed(3), scale=1.0, **options)[:, 0, 0].tolist()

    assert rows() == pytest.approx([1, 2, 4])
    assert rows(window=2) == pytest.approx([1, 2, 5.5])
    assert rows(sinks=torch.zeros(1)) == pytest.approx([0.5, 4 / 3, 3])


DECODING = {
    "evenly spaced": [(0, 5), (8, 16), (16, 17)],
    "unevenly spaced": [(0, 5), (7, 15), (20, 21)],
    "backwards": [(16, 20), (8, 11), (0, 7)],
    "to the last row": [(0, 8), (8, 10), (16, 24)],
    "past the last row": [(0, 8), (10, 13), (20, 24)],
    "shared": [(4, 9), (4, 7), (4, 12)],
}


@pytest.mark.parametrize("window", [None, 1, 4, 30])
@pytest.mark.parametrize("name", DECODING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_reads_no_unwritten_row(name: str, window: int | None, dtype: torch.dtype) -> None:
    segments = [Segment(i, i + 1, k0, k1) for i, (k0, k1) in enumerate(DECODING[name])]
    q, k, v = make(3, 24, dtype=dtype)
    assert_same((q, k, v), segments, tolerance=1e-5 if dtype == torch.float32 else 1e-2, window=window)
    expected = attention_reference(q, k, v, segments, scale=SCALE, window=window)
    unwritten = torch.ones(24, dtype=torch.bool)
    for segment in segments:
        unwritten[segment.k0 : segment.k1] = False
    k[unwritten], v[unwritten] = float("nan"), float("nan")
    got = attention(q, k, v, segments, scale=SCALE, window=window)
    torch.testing.assert_close(got, expected, rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-5)
    for n, segment in enumerate(segments):  # one at a time, and all together going forward with gradients
        alone = attention(q[n : n + 1], k, v, [replace(segment, q0=0, q1=1)], scale=SCALE, window=window)
        torch.testing.assert_close(alone, got[n : n + 1], rtol=max(1e-5, torch.finfo(dtype).eps), atol=1e-5)
    query = q.clone().requires_grad_()
    attention(query, k, v, segments, scale=SCALE, window=window).sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("broken", ["keys", "values"])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"window": 4}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sequence_of_broken_values_is_broken_alone(broken: str, options: dict[str, Any], value: float) -> None:
    """Decoding, whole packs and parts of sequences: no neighbour notices, on whichever side it lies."""
    for segments in (
        [Segment(n, n + 1, 8 * n, 8 * n + size) for n, size in enumerate((3, 8, 5))],
        packed(8, 8, 8),
        [Segment(2 * n, 2 * n + 2, 8 * n, 8 * n + size) for n, size in enumerate((3, 8, 5))],
    ):
        q, k, v = make(segments[-1].q1, 24)
        with torch.no_grad():
            expected = attention(q, k, v, segments, scale=SCALE, **options)
            (k if broken == "keys" else v)[8:16] = value
            got = attention(q, k, v, segments, scale=SCALE, **options)
        own = slice(segments[1].q0, segments[1].q1)
        assert torch.equal(got[: own.start], expected[: own.start])
        assert torch.equal(got[own.stop :], expected[own.stop :])
        assert not torch.equal(got[own], expected[own])


def test_decoding_from_a_view_of_a_store() -> None:
    q, k, v = make(3, 24)
    segments = [Segment(i, i + 1, 6 * i, 6 * i + 2 + i) for i in range(3)]
    expected = attention_reference(q, k, v, segments, scale=SCALE)
    store = torch.full((2, 30, 2, DIM), 1e30)  # keys and values after rows of another
    store[0, 6:], store[1, 6:] = k, v
    got = attention(q, store[0, 6:], store[1, 6:], segments, scale=SCALE)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    strided = torch.stack([k, v], 1)  # [keys, 2, kv_heads, dim]: views that are not contiguous
    got = attention(q, strided[:, 0], strided[:, 1], segments, scale=SCALE)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_sequences_read_no_row_beyond_their_keys() -> None:
    q, k, v = make(9, 20)
    segments = [Segment(0, 4, 2, 8), Segment(4, 9, 10, 15)]
    expected = attention_reference(q, k, v, segments, scale=SCALE, window=3)
    for rows in (k, v):
        rows[[0, 1, 8, 9, *range(15, 20)]] = float("nan")
    got = attention(q, k, v, segments, scale=SCALE, window=3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
