"""decode: one query per segment without gradients, segments of like length in one batched product."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int

from postil.kernels.layout import Segment

SHORT = 7  # sequences of up to 2^7 keys count as alike, then each doubling is a batch of its own


@dataclass(frozen=True, slots=True)
class _Batch:
    """Segments of like length. queries: their rows of q (None: all, in order). index: where their keys lie among all
    heads of all rows of k, head by head, `longest` for each. hide: those that are too many (None: none)."""

    count: int
    longest: int
    queries: Int[torch.Tensor, " count"] | None
    index: Int[torch.Tensor, " count*kv_heads*longest"]
    hide: Bool[torch.Tensor, "count 1 1 longest"] | None


def decode(
    q: Float[torch.Tensor, "tokens heads dim"],
    k: Float[torch.Tensor, "keys kv_heads dim"],
    v: Float[torch.Tensor, "keys kv_heads value_dim"],
    segments: tuple[Segment, ...],
    scale: float,
    window: int | None,
) -> Float[torch.Tensor, "tokens heads value_dim"]:
    """softmax(scale q k^T) v of one query per segment, none with a prefix; scores and sums are float32, whether one
    row decodes or many. No row of k or v but a segment's own is read."""
    plan = _plan if type(q) is torch.Tensor and q.device.type != "meta" else _plan.__wrapped__  # not while planning
    batches = plan(segments, window, k.shape[1], q.device)
    if len(batches) == 1:
        return _together(q, k, v, batches[0], scale)
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    for batch in batches:
        assert batch.queries is not None
        out[batch.queries] = _together(q[batch.queries], k, v, batch, scale)
    return out


@lru_cache(maxsize=16)
def _plan(segments: tuple[Segment, ...], window: int | None, kv_heads: int, device: torch.device) -> list[_Batch]:
    """The batches of one pass; every layer with this window asks for the same."""
    first = [s.k0 if window is None else max(s.k0, s.k1 - window) for s in segments]
    alike: dict[int, list[int]] = {}
    for n, segment in enumerate(segments):
        alike.setdefault(max((segment.k1 - first[n] - 1).bit_length(), SHORT), []).append(n)
    batches = []
    with torch.inference_mode(False):
        heads = torch.arange(kv_heads, device=device)[:, None]
        for chosen in alike.values():
            lengths = [segments[n].k1 - first[n] for n in chosen]
            columns = torch.arange(max(lengths), device=device)
            starts, ends = (
                torch.tensor(rows, device=device)[:, None]
                for rows in ([first[n] for n in chosen], [segments[n].k1 for n in chosen])
            )
            places = torch.minimum(starts + columns, ends - 1)  # beyond its keys the segment's own last one
            even = min(lengths) == max(lengths)
            batches.append(
                _Batch(
                    len(chosen),
                    max(lengths),
                    queries=None if len(alike) == 1 else torch.tensor(chosen, device=device),
                    index=(places[:, None] * kv_heads + heads).flatten(),
                    hide=None if even else (columns >= ends - starts)[:, None, None],
                )
            )
    return batches


def _together(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: _Batch, scale: float
) -> Float[torch.Tensor, "count heads value_dim"]:
    heads, kv_heads = q.shape[1], k.shape[1]
    shape = (batch.count, kv_heads, batch.longest, -1)
    keys, values = (x.reshape(-1, x.shape[2]).index_select(0, batch.index).float().view(shape) for x in (k, v))
    grouped = q.reshape(batch.count, kv_heads, heads // kv_heads, -1).float()
    scores = torch.matmul(grouped, keys.transpose(2, 3)).mul_(scale)  # [count, kv_heads, group, longest]
    if batch.hide is not None:
        scores.masked_fill_(batch.hide, float("-inf"))
    return torch.matmul(scores.softmax(-1), values).reshape(batch.count, heads, -1).to(q.dtype)
