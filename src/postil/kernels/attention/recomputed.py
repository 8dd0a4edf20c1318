"""recomputed: attention in blocks by the reference, whose scores the backward pass makes again instead of keeping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch.autograd.function import once_differentiable

from postil.kernels.attention.reference import attention_reference
from postil.kernels.layout import Segment


def recomputed(
    q: Float[torch.Tensor, "tokens heads dim"],
    k: Float[torch.Tensor, "keys kv_heads dim"],
    v: Float[torch.Tensor, "keys kv_heads value_dim"],
    blocks: Sequence[Segment],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[torch.Tensor, " heads"] | None = None,
) -> Float[torch.Tensor, "queries heads value_dim"]:
    """As the reference, for blocks of queries that follow one another. Autograd keeps q, k, v alone, nothing of
    [queries, keys]; gradients are summed over the blocks in float32."""
    options = {"scale": scale, "window": window, "softcap": softcap}
    out: torch.Tensor = _Recomputed.apply(q, k, v, sinks, blocks, options)  # type: ignore[no-untyped-call]
    return out


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        blocks: Sequence[Segment],
        options: dict[str, Any],
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, sinks)
        ctx.blocks, ctx.options = blocks, options
        return torch.cat([attention_reference(q, k, v, [block], sinks=sinks, **options) for block in blocks])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, sinks = ctx.saved_tensors
        sums = [torch.zeros(part.shape, dtype=torch.float32, device=part.device) for part in (q, k, v)]
        dq, dk, dv = sums
        dsinks = None if sinks is None else torch.zeros(sinks.shape, dtype=torch.float32, device=sinks.device)
        first = ctx.blocks[0].q0
        for block in ctx.blocks:
            rows = slice(block.q0, block.q1)
            parts = [q[rows], block.rows(k), block.rows(v), *([] if sinks is None else [sinks])]
            leaves = [part.detach().float().requires_grad_() for part in parts]
            own = replace(block, q0=0, q1=len(leaves[0]), k0=0, k1=len(leaves[1]), prefix=())
            with torch.enable_grad():
                out = attention_reference(
                    leaves[0], leaves[1], leaves[2], [own], sinks=None if sinks is None else leaves[3], **ctx.options
                )
            found = torch.autograd.grad(out, leaves, grad[block.q0 - first : block.q1 - first].float())
            dq[rows] = found[0]
            at = 0
            for start, end in (*block.prefix, (block.k0, block.k1)):
                dk[start:end] += found[1][at : at + end - start]
                dv[start:end] += found[2][at : at + end - start]
                at += end - start
            if dsinks is not None:
                dsinks += found[3]
        out_of = [total.to(part.dtype) for total, part in zip(sums, (q, k, v), strict=True)]
        return *out_of, None if dsinks is None else dsinks.to(sinks.dtype), None, None
