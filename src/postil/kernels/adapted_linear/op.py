"""adapted_linear: y_j = x W_j^T + b_j + s_i (x A_ij^T) B_ij^T on the rows of span i, as one autograd node.

LoRA, Hu et al. 2021, equation 3. The node keeps x and h = x A^T and nothing of the base's size; the base
stands behind matmul / matmul_t, so it may be dense, 4-bit or streamed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch.autograd.function import once_differentiable

from postil.errors import AdapterError
from postil.kernels.adapted_linear.dropout import dropout
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
    replaces the base's bias, where it has one (None: nothing does); dropout: probability on x before A, drawn for
    each member by itself.
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
            for key in [key for key, (alive, *_) in self._casts.items() if alive() is None]:
                del self._casts[key]  # of a tensor that was replaced
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
    base. The backward pass raises AdapterError where one of the slots was taken out of the bank since, RuntimeError,
    as torch's own ops do, where an A or B was written to. Raises AdapterError where an adapter lies on another
    device than x.
    """
    spans.check(x.shape[0])
    used = replace(spans, items=tuple(item for item in spans.items if item.slot in group.slots))
    slots = {item.slot: group.slots[item.slot] for item in used.items}
    for slot in slots.values():
        if slot.a.device != x.device:
            raise AdapterError(
                f"the model was moved to {x.device} after an adapter was attached, which lies on {slot.a.device}: "
                "move the base first, and attach adapters then"
            )
    tensors = [tensor for slot in slots.values() for tensor in slot.tensors()]
    outputs: tuple[torch.Tensor, ...] = _AdaptedLinear.apply(x, group, used, slots, *tensors)  # type: ignore[no-untyped-call]
    return outputs


def drop(x: torch.Tensor, group: Group, member: int, slot: AdapterSlot, spans: Spans, span: Span) -> torch.Tensor:
    """x of one span with one member's dropout: by the numbers of its rows, the same in recomputation."""
    if not _drops(slot, span):
        return x
    key = derive(span.seed, group.name, member)
    return dropout(x, key, spans.numbers(span, x.device), slot.dropout)


def _parts(slot: AdapterSlot, *, each: bool) -> list[tuple[int, int, int]]:
    """(member, from row, to row) of A: by member, or all at once as the first one's."""
    if not each:
        return [(0, 0, slot.a.shape[0])]
    return [(j, low, high) for j, (low, high) in enumerate(slot.ranges()) if high > low]


def _drops(slot: AdapterSlot, span: Span) -> bool:
    return bool(slot.dropout and span.seed)


def _down(x: torch.Tensor, group: Group, slot: AdapterSlot, spans: Spans, span: Span) -> torch.Tensor:
    """h = x A^T [rows, ranks], the members' ranks side by side: one product; one a member where dropout gives each
    an x of its own, and in float32, which rounds as each does alone: a plain pass then has the bits of PEFT's."""
    a, each = slot.cast(slot.a, x.dtype), _drops(slot, span) or x.dtype == torch.float32
    parts = [drop(x, group, j, slot, spans, span) @ a[low:high].T for j, low, high in _parts(slot, each=each)]
    if len(parts) == 1:
        return parts[0]
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
        spans: Spans,
        slots: dict[int, AdapterSlot],
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        outputs = [member.matmul(x) for member in group.members]
        hidden = []
        for span in spans.items:
            slot = slots[span.slot]
            rows = slice(span.start, span.end)
            h = _down(x[rows], group, slot, spans, span)
            hidden.append(h)
            for j, (low, high) in enumerate(slot.ranges()):
                b, bias = slot.b[j], slot.biases[j]
                if b is not None:
                    _add_up(outputs[j][rows], h[:, low:high], slot.cast(b, x.dtype), span.scale * slot.scales[j])
                if bias is not None:
                    own = group.members[j].bias
                    assert own is not None
                    shift = bias.detach() - own.detach()
                    outputs[j][rows].add_(shift.to(x.dtype), alpha=span.scale)
        ctx.save_for_backward(x, *hidden, *tensors)  # the tensors for their versions' sake
        ctx.group, ctx.spans, ctx.slots = group, spans, slots
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *hidden = ctx.saved_tensors
        group: Group = ctx.group
        spans: Spans = ctx.spans
        slots: dict[int, AdapterSlot] = ctx.slots
        if any(group.slots.get(number) is not slot for number, slot in slots.items()):
            raise AdapterError("an adapter was removed after the forward pass; go backward before removing it")
        dx: torch.Tensor | None = None
        if ctx.needs_input_grad[0]:
            for member, grad in zip(group.members, grads, strict=True):
                part = member.matmul_t(grad)  # dy_j W_j
                dx = part if dx is None else dx.add_(part)
        sums: dict[int, list[torch.Tensor | None]] = {
            key: [None] * len(slot.tensors()) for key, slot in slots.items()
        }
        for span, h in zip(spans.items, hidden[: len(spans.items)], strict=True):
            slot = slots[span.slot]
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
            a, parts = slot.cast(slot.a, x.dtype), _parts(slot, each=_drops(slot, span))
            da = torch.zeros_like(slot.a)
            for j, low, high in parts:
                da[low:high] = dh[:, low:high].T @ drop(x[rows], group, j, slot, spans, span)  # dh^T x
                if dx is not None:
                    dx[rows] += drop(dh[:, low:high] @ a[low:high], group, j, slot, spans, span)
            _accumulate(sums[span.slot], 0, da, slot.a)
        return dx, None, None, None, *(part for key in slots for part in sums[key])


def _accumulate(sums: list[torch.Tensor | None], index: int, part: torch.Tensor, like: torch.Tensor) -> None:
    part = part.to(like.dtype)
    known = sums[index]
    sums[index] = part if known is None else known + part
