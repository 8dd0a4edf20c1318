"""The plain torch form of attention over segments: scores, soft cap, masks, softmax, one segment at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float

from postil.kernels.layout import Segment


def attention_reference(
    q: Float[torch.Tensor, "tokens heads dim"],
    k: Float[torch.Tensor, "keys kv_heads dim"],
    v: Float[torch.Tensor, "keys kv_heads dim"],
    segments: Sequence[Segment],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[torch.Tensor, " heads"] | None = None,
) -> Float[torch.Tensor, "tokens heads dim"]:
    """softmax(cap(scale q k^T) + mask) v per segment (Vaswani et al. 2017, equation 1), in float32."""
    repeat = q.shape[1] // k.shape[1]
    outputs = []
    for segment in segments:
        keys = segment.rows(k).repeat_interleave(repeat, 1).float()
        values = segment.rows(v).repeat_interleave(repeat, 1).float()
        queries = q[segment.q0 : segment.q1].float()
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible(segment, window, q.device), float("-inf"))
        if sinks is not None:
            extra = sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
            weights = torch.cat([scores, extra], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype))
    return torch.cat(outputs) if outputs else torch.zeros_like(q)


def visible(segment: Segment, window: int | None, device: torch.device) -> torch.Tensor:
    """bool [queries, prefix + keys]: which keys each query of one segment sees."""
    queries, keys = segment.q1 - segment.q0, segment.ahead + segment.k1 - segment.k0
    row = torch.arange(keys - queries, keys, device=device)[:, None]
    column = torch.arange(keys, device=device)[None, :]
    seen = column <= row
    if window is not None:
        seen &= column > row - window
    return seen
