"""attention: the fast path over segments, with torch's fused kernel for sequences and one batch for decoding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float

from postil.kernels.attention.reference import attention_reference, visible
from postil.kernels.layout import Segment

SMALL_MASK = 2**15  # bytes of a mask that is kept: at most 16 MiB of them


def attention(
    q: Float[torch.Tensor, "tokens heads dim"],
    k: Float[torch.Tensor, "keys kv_heads dim"],
    v: Float[torch.Tensor, "keys kv_heads value_dim"],
    segments: Sequence[Segment],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[torch.Tensor, " heads"] | None = None,
) -> Float[torch.Tensor, "tokens heads value_dim"]:
    """softmax(cap(scale q k^T) + mask) v per segment; same signature and result as the reference.

    window: a query sees itself and the window-1 keys before it (None: all before it). softcap: scores become
    softcap·tanh(score/softcap) (Gemma 2). sinks: one extra logit per head that takes weight and gives no value.
    Segments cover the queries in order. No mask larger than [queries of a block, keys it can see] is made. Every
    row of v is finite: a decoding batch reads rows beyond a segment's keys with weight 0.
    """
    segments = [segment for segment in segments if segment.q1 > segment.q0]
    plain = softcap is None and sinks is None
    alone = not any(segment.prefix for segment in segments)
    if plain and alone and len(segments) > 1 and all(segment.q1 - segment.q0 == 1 for segment in segments):
        return _decode(q, k, v, segments, scale, window)
    if plain and _whole_pack(segments, q.shape[0], k.shape[0]):
        return _pack(q, k, v, segments, scale, window)
    outputs = []
    for segment in segments:
        if plain and not segment.prefix:
            outputs.append(_sequence(q, k, v, segment, scale, window))
            continue
        for block in _blocks(segment, window):
            outputs.append(
                attention_reference(q, k, v, [block], scale=scale, window=window, softcap=softcap, sinks=sinks)
            )
    return torch.cat(outputs) if outputs else q.new_zeros(q.shape[0], q.shape[1], v.shape[2])


def _whole_pack(segments: Sequence[Segment], queries: int, keys: int) -> bool:
    """Whether the segments are whole sequences, or rests of them, one after another, that fill the batch."""
    if not segments or queries != keys:
        return False
    edges = [0, *(segment.q1 for segment in segments)]
    own = all(s.k0 == s.q0 == start and s.k1 == s.q1 for s, start in zip(segments, edges, strict=False))
    return own and edges[-1] == queries


def _pack(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: Sequence[Segment], scale: float, window: int | None
) -> torch.Tensor:
    """Sequences of a pack: heads are repeated and the rows split once, so the backward pass joins them once.

    On the CPU torch's fused kernel is twice as fast in float32 as in 16 bits on short sequences (bench/LOG.md).
    """
    dtype = q.dtype
    if q.device.type == "cpu":
        q, k, v = q.float(), k.float(), v.float()
    if k.shape[1] != q.shape[1]:
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    lengths = [segment.q1 - segment.q0 for segment in segments]
    outputs = []
    for segment, a, b, c in zip(segments, *(torch.split(part, lengths) for part in (q, k, v)), strict=True):
        if segment.prefix:
            b, c = segment.rows(k), segment.rows(v)
        outputs.append(_sequence(a, b, c, Segment(0, len(a), 0, len(b)), scale, window))
    return torch.cat(outputs).to(dtype)


def _blocks(segment: Segment, window: int | None, size: int = 256) -> list[Segment]:
    """The segment cut into blocks of queries, each with no more keys than it can see."""
    queries = segment.q1 - segment.q0
    offset = segment.k1 - queries  # the key row of the segment's first query
    blocks = []
    for start in range(0, queries, size):
        end = min(start + size, queries)
        first = segment.k0 if window is None else max(segment.k0, offset + start - window + 1)
        prefix = segment.prefix if first == segment.k0 else ()  # else the window has left it behind
        blocks.append(Segment(segment.q0 + start, segment.q0 + end, first, offset + end, prefix))
    return blocks


def _sequence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segment: Segment,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    queries, keys = segment.q1 - segment.q0, segment.k1 - segment.k0
    if queries == keys and (window is None or keys <= window):
        return _fused(q, k, v, segment, scale, None, causal=True)
    if queries == 1:
        first = segment.k0 if window is None else max(segment.k0, segment.k1 - window)
        return _fused(q, k, v, Segment(segment.q0, segment.q1, first, segment.k1), scale, None)
    outputs = []
    for block in _blocks(segment, window):
        mask = _mask(block, window, q)
        outputs.append(_fused(q, k, v, block, scale, mask))
    return torch.cat(outputs)


def _mask(block: Segment, window: int | None, q: torch.Tensor) -> torch.Tensor:
    """bool [queries, keys]: which keys each of the last queries sees; small ones are made once for all layers."""
    queries, keys = block.q1 - block.q0, block.k1 - block.k0
    kept = queries * keys <= SMALL_MASK and type(q) is torch.Tensor and q.device.type != "meta"  # not while planning
    make = _small_mask if kept else _small_mask.__wrapped__
    return make(queries, keys, window, q.device)


@lru_cache(maxsize=512)
def _small_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return visible(Segment(0, queries, 0, keys), window, device)


def _fused(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segment: Segment,
    scale: float,
    mask: torch.Tensor | None,
    causal: bool = False,
) -> torch.Tensor:
    heads, kv_heads = q.shape[1], k.shape[1]

    def by_head(rows: torch.Tensor) -> torch.Tensor:  # [keys, kv_heads, dim] -> [1, heads, keys, dim]
        if kv_heads != heads:
            rows = rows.repeat_interleave(heads // kv_heads, 1)
        return rows.transpose(0, 1)[None]

    out = F.scaled_dot_product_attention(
        q[segment.q0 : segment.q1].transpose(0, 1)[None],
        by_head(k[segment.k0 : segment.k1]),
        by_head(v[segment.k0 : segment.k1]),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
    )
    return out[0].transpose(0, 1)


def _decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Sequence[Segment],
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """One query per segment: all segments in one batched product, keys viewed in place where evenly spaced."""
    longest = max(segment.k1 - segment.k0 for segment in segments)
    keys = _batched_rows(k, segments, longest)  # [batch, longest, kv_heads, dim]
    values = _batched_rows(v, segments, longest)
    batch, heads, dim = q.shape
    kv_heads = k.shape[1]
    lengths = torch.tensor([segment.k1 - segment.k0 for segment in segments], device=q.device)[:, None]
    columns = torch.arange(longest, device=q.device)[None, :]
    hide = columns >= lengths
    if window is not None:
        hide |= columns < lengths - window
    grouped = q.view(batch, kv_heads, heads // kv_heads, dim)
    scores = torch.matmul(grouped, keys.permute(0, 2, 3, 1)).float() * scale  # [batch, kv, group, longest]
    scores.masked_fill_(hide[:, None, None, :], float("-inf"))
    weights = scores.softmax(-1).to(v.dtype)  # exactly 0 where hidden
    return torch.matmul(weights, values.transpose(1, 2)).reshape(batch, heads, -1)


def _batched_rows(x: torch.Tensor, segments: Sequence[Segment], longest: int) -> torch.Tensor:
    starts = [segment.k0 for segment in segments]
    step = starts[1] - starts[0]
    even = all(b - a == step for a, b in itertools.pairwise(starts))
    if even and step >= 0 and starts[-1] + longest <= x.shape[0] and x.is_contiguous():
        row = x.stride(0)
        return x.as_strided(
            (len(starts), longest, x.shape[1], x.shape[2]),
            (step * row, row, x.stride(1), x.stride(2)),
            x.storage_offset() + starts[0] * row,
        )
    index = torch.tensor(starts, device=x.device)[:, None] + torch.arange(longest, device=x.device)
    return x[index.clamp_(max=x.shape[0] - 1)]
