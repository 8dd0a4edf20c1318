"""attention: the fast path over segments, with torch's fused kernel for sequences and batches for decoding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float

from postil.kernels.attention.decode import decode
from postil.kernels.attention.recomputed import recomputed
from postil.kernels.attention.reference import visible
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
    Segments cover the queries in order. Nothing larger than [queries of a block, keys it can see] is made; of that
    the backward pass keeps a mask at most, where torch's kernel wants one. Scores and sums are float32 (so a device's
    fused kernel sums, too), rounded once to q's dtype. What k and v hold outside a segment's own keys counts for
    nothing, be it NaN.
    """
    segments = [segment for segment in segments if segment.q1 > segment.q0]
    if not segments:
        return q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    alone = not any(segment.prefix for segment in segments)
    if softcap is not None or sinks is not None:
        blocks = [block for segment in segments for block in _blocks(segment, window)]
        return recomputed(q, k, v, blocks, scale=scale, window=window, softcap=softcap, sinks=sinks)
    learning = torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v))
    if alone and not learning and all(segment.q1 - segment.q0 == 1 for segment in segments):
        return decode(q, k, v, tuple(segments), scale, window)
    if _whole_pack(segments, q.shape[0], k.shape[0]):
        return _pack(q, k, v, segments, scale, window)
    outputs = []
    for segment in segments:
        if segment.prefix:
            outputs.append(recomputed(q, k, v, _blocks(segment, window), scale=scale, window=window))
        else:
            outputs.append(_sequence(q, k, v, segment, scale, window))
    return torch.cat(outputs)


def _whole_pack(segments: Sequence[Segment], queries: int, keys: int) -> bool:
    """Whether the segments are whole sequences, or rests of them, one after another, that fill the batch."""
    if queries != keys:
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

    def by_head(rows: torch.Tensor) -> torch.Tensor:  # [keys, kv_heads or heads, dim] -> [1, heads, keys, dim]
        rows = rows.float() if q.device.type == "cpu" else rows
        if rows.shape[1] != heads:
            rows = rows.repeat_interleave(heads // kv_heads, 1)
        return rows.transpose(0, 1)[None]

    out = F.scaled_dot_product_attention(
        by_head(q[segment.q0 : segment.q1]),
        by_head(k[segment.k0 : segment.k1]),
        by_head(v[segment.k0 : segment.k1]),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
    )
    return out[0].transpose(0, 1).to(q.dtype)
