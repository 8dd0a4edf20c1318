"""adapted_linear: y_j = x W_j^T + b_j + s_i (x A_ij^T) B_ij^T on the rows of span i, as one autograd node.

LoRA, Hu et al. 2021, equation 3. The node keeps x and h = x A^T and nothing of the base's size; the base
stands behind matmul / matmul_t, so it may be dense, 4-bit or streamed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch.autograd.function import once_differentiable

from postil.errors import AdapterError
from postil.kernels.layout import Span, Spans
from postil.seeds import derive


class Projection(Protocol):
    """A frozen linear map d_in → d_out; its weight is looked up at every call, never captured."""

    @property
    def bias(self) -> torch.Tensor | None: ...

    def matmul(self, x: Float[torch.Tensor, "n d_in"]) -> Float[torch.Tensor, "n d_out"]:
        """x W^T + b."""

    def matmul_t(self, g: Float[torch.Tensor, "n d_out"]) -> Float[torch.Tensor, "n d_in"]:
        """g W."""


@dataclass(slots=True)
class AdapterSlot:
    """One adapter's part in a group of projections that share x.

    a: [sum of ranks, d_in], the members' A joined; b: per member [d_out, rank] (None: the adapter leaves
    this member alone); scales: alpha/r per member (alpha/sqrt(r) for rsLoRA); biases: per member, what
    replaces the base's bias (None: the base's own); dropout: probability on x before A.
    """

    a: Float[torch.Tensor, "ranks d_in"]
    b: tuple[Float[torch.Tensor, "d_out rank"] | None, ...]
    scales: tuple[float, ...]
    biases: tuple[Float[torch.Tensor, " d_out"] | None, ...]
    dropout: float = 0.0
    _casts: dict[tuple[int, torch.dtype], tuple[weakref.ref[torch.Tensor], int, torch.Tensor]] = field(
        default_factory=dict, repr=False
    )

    def ranges(self) -> list[tuple[int, int]]:
        """Per member, its rows of `a`."""
        out, start = [], 0
        for b in self.b:
            rank = 0 if b is None else b.shape[1]
            out.append((start, start + rank))
            start += rank
        return out

    def cast(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`tensor` in the compute dtype, cast once per version of its values."""
        if tensor.dtype == dtype:
            return tensor.detach()
        if tensor.is_inference():  # counts no versions
            return tensor.to(dtype)
        known = self._casts.get((id(tensor), dtype))
        if known is None or known[0]() is not tensor or known[1] != tensor._version:  # an id may come again
            known = (weakref.ref(tensor), tensor._version, tensor.detach().to(dtype))
            self._casts[(id(tensor), dtype)] = known
        return known[2]

    def tensors(self) -> list[torch.Tensor | None]:
        """a, the b's, the biases: the order in which gradients come back."""
        return [self.a, *self.b, *self.biases]


@dataclass(slots=True)
class Group:
    """Frozen projections that share x, and the bank of their adapters by slot number."""

    name: str
    members: Sequence[Projection]
    slots: dict[int, AdapterSlot] = field(default_factory=dict)


def adapted_linear(
    x: Float[torch.Tensor, "tokens d_in"], group: Group, spans: Spans
) -> tuple[Float[torch.Tensor, "tokens d_out"], ...]:
    """The outputs of every member of `group` for the packed rows `x`.

    x: [tokens, d_in] in the compute dtype; returns per member [tokens, d_out] in the same dtype. Spans whose
    slot is not in the group's bank are of adapters that leave the group alone (the caller has seen that they are
    attached): the rows stay as the base has them. Gradients flow to x and to the slots' float tensors, never to the
    base; a backward pass after one of the slots was taken out of the bank raises AdapterError.
    """
    spans.check(x.shape[0])
    used = tuple(item for item in spans.items if item.slot in group.slots)
    slots = list(dict.fromkeys(item.slot for item in used))
    tensors = [tensor for slot in slots for tensor in group.slots[slot].tensors()]
    outputs: tuple[torch.Tensor, ...] = _AdaptedLinear.apply(x, group, used, slots, *tensors)  # type: ignore[no-untyped-call]
    return outputs


def drop(x: torch.Tensor, span: Span, slot: AdapterSlot, group: Group) -> torch.Tensor:
    """x of one span with inverted dropout from the span's own counter-based mask: the same in recomputation."""
    if not slot.dropout or not span.seed:
        return x
    generator = torch.Generator().manual_seed(derive(span.seed, group.name))
    keep = torch.rand(x.shape, generator=generator) >= slot.dropout
    return x * (keep.to(x.dtype) / (1.0 - slot.dropout)).to(x.device)


def _down(x: torch.Tensor, slot: AdapterSlot) -> torch.Tensor:
    """h = x A^T [rows, ranks], the members' ranks side by side: one product in 16 bits; in float32 one a member,
    which rounds as each does alone: a plain float32 pass then has the bits of PEFT's."""
    a = slot.cast(slot.a, x.dtype)
    if x.dtype != torch.float32:
        return x @ a.T
    parts = [x @ a[low:high].T for low, high in slot.ranges() if high > low]
    return torch.cat(parts, dim=1) if parts else x.new_zeros(x.shape[0], 0)


def _add_up(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """y += s h B^T in place: one product in 16 bits; in float32 the term is rounded first, as PEFT does."""
    if y.dtype == torch.float32:
        y.add_((h @ b.T).mul_(scale))
    else:
        y.addmm_(h, b.T, alpha=scale)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        group: Group,
        spans: tuple[Span, ...],
        slots: list[int],
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        outputs = [member.matmul(x) for member in group.members]
        hidden = []
        for span in spans:
            slot = group.slots[span.slot]
            rows = slice(span.start, span.end)
            h = _down(drop(x[rows], span, slot, group), slot)
            hidden.append(h)
            for j, (low, high) in enumerate(slot.ranges()):
                b, bias = slot.b[j], slot.biases[j]
                if b is not None:
                    _add_up(outputs[j][rows], h[:, low:high], slot.cast(b, x.dtype), span.scale * slot.scales[j])
                if bias is not None:
                    own = group.members[j].bias
                    shift = bias.detach() if own is None else bias.detach() - own.detach()
                    outputs[j][rows].add_(shift.to(x.dtype), alpha=span.scale)
        ctx.save_for_backward(x, *hidden)
        ctx.group, ctx.spans, ctx.slots = group, spans, slots
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *hidden = ctx.saved_tensors
        group: Group = ctx.group
        if not all(slot in group.slots for slot in ctx.slots):
            raise AdapterError("an adapter was removed after the forward pass; go backward before removing it")
        dx: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            for member, grad in zip(group.members, grads, strict=True):
                part = member.matmul_t(grad)  # dy_j W_j
                dx = part if dx is None else dx.add_(part)
        sums: dict[int, list[torch.Tensor | None]] = {
            slot: [None] * len(group.slots[slot].tensors()) for slot in ctx.slots
        }
        for span, h in zip(ctx.spans, hidden, strict=True):
            slot = group.slots[span.slot]
            rows = slice(span.start, span.end)
            dh = torch.zeros_like(h)
            for j, (low, high) in enumerate(slot.ranges()):
                grad, b, bias = grads[j][rows], slot.b[j], slot.biases[j]
                scale = span.scale * slot.scales[j]
                if b is not None:
                    dh[:, low:high] = (grad @ slot.cast(b, x.dtype)) * scale  # s dy B
                    _accumulate(sums[span.slot], 1 + j, (grad.T @ h[:, low:high]) * scale, b)  # s dy^T h
                if bias is not None:
                    _accumulate(sums[span.slot], 1 + len(slot.b) + j, grad.float().sum(0) * span.scale, bias)
            _accumulate(sums[span.slot], 0, dh.T @ drop(x[rows], span, slot, group), slot.a)  # dh^T x
            if dx is not None:
                dx[rows] += drop(dh @ slot.cast(slot.a, x.dtype), span, slot, group)
        return dx, None, None, None, *(part for slot in ctx.slots for part in sums[slot])


def _accumulate(sums: list[torch.Tensor | None], index: int, part: torch.Tensor, like: torch.Tensor) -> None:
    part = part.to(like.dtype)
    known = sums[index]
    sums[index] = part if known is None else known + part
