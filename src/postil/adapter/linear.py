"""How adapters sit on a model's modules: each module's own forward is stood in for, its parameters untouched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from postil.adapter.bank import EmbeddingSlot
from postil.adapter.targets import kind_of, sizes_of
from postil.base import Nf4Linear
from postil.errors import InternalError
from postil.kernels.adapted_linear import Group, Projection, adapted_linear
from postil.kernels.dense import matmul, matmul_t, multiplies
from postil.kernels.layout import Span, Spans

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
SpansOf = Callable[[int], Spans]  # number of rows → the spans in force


@dataclass(slots=True)
class DenseProjection:
    """A frozen nn.Linear (weight [d_out, d_in]) or Conv1D (weight [d_in, d_out]), read at every call."""

    module: nn.Module
    conv1d: bool

    @property
    def weight(self) -> torch.Tensor:
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        bias = self.module.bias
        return bias if isinstance(bias, torch.Tensor) else None

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + b."""
        return matmul(x, self.weight.T if self.conv1d else self.weight, self.bias)

    def matmul_t(self, g: torch.Tensor) -> torch.Tensor:
        """g W."""
        return matmul_t(g, self.weight.T if self.conv1d else self.weight)


def projection_of(module: nn.Module) -> Projection:
    """A linear module as adapted_linear takes it; a 4-bit layer multiplies by itself."""
    return module if isinstance(module, Nf4Linear) else DenseProjection(module, kind_of(module) == "conv1d")


def slow_projections(model: nn.Module) -> list[tuple[nn.Module, DenseProjection]]:
    """The dense linear modules whose dtype this CPU multiplies slowly by torch's own forward."""
    dense = [
        (module, DenseProjection(module, kind == "conv1d"))
        for module in model.modules()
        if (kind := kind_of(module)) in ("linear", "conv1d")
        and not isinstance(module, Nf4Linear)
        and "forward" not in vars(module)
    ]
    return [
        (module, projection)
        for module, projection in dense
        if projection.weight.device.type == "cpu" and not multiplies(projection.weight.dtype)
    ]


@dataclass(slots=True)
class SharedInput:
    """The projections of one group as transformers calls them, one after another with the same x.

    The first call computes all members, the others take their part; another x, a changed one or changed values
    of an adapter are computed anew, so the result is always that of the given x.
    """

    group: Group
    paths: tuple[str, ...]
    spans_of: SpansOf
    _x: torch.Tensor | None = None
    _state: tuple[bool, Spans, tuple[int, ...]] | None = None
    _parts: list[torch.Tensor | None] = field(default_factory=list)

    def forward(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """The output of one member for x [..., d_in]."""
        rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
        spans = self.spans_of(rows)
        if not any(item.slot in self.group.slots for item in spans.items):
            return self.group.members[member].matmul(x)
        state = (torch.is_grad_enabled(), spans, self._versions(x, spans))
        known = self._parts[member] if x is self._x and state == self._state and self._parts else None
        if known is None:
            self.forget()
            self._parts = list(adapted_linear(x.reshape(rows, x.shape[-1]), self.group, spans))
            self._x, self._state = x, state
            known = self._parts[member]
        assert known is not None
        self._parts[member] = None
        if not any(part is not None for part in self._parts):
            self.forget()
        return known.view(*x.shape[:-1], known.shape[-1])

    def _versions(self, x: torch.Tensor, spans: Spans) -> tuple[int, ...]:
        """How often x and the tensors of the adapters in force were written to (inference tensors do not count)."""
        slots = [self.group.slots[item.slot] for item in spans.items if item.slot in self.group.slots]
        tensors = [x, *(tensor for slot in slots for tensor in slot.tensors() if tensor is not None)]
        return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)

    def forget(self) -> None:
        """Let go of x and of outputs that nobody asked for."""
        self._x, self._state, self._parts = None, None, []


@dataclass(slots=True)
class AdaptedEmbedding:
    """An embedding and its adapters: y = E[ids] + s·e·(A^T[ids]) B^T, e the embedding's own scale (Gemma)."""

    module: nn.Module
    original: Callable[..., torch.Tensor]
    spans_of: SpansOf
    slots: dict[int, EmbeddingSlot] = field(default_factory=dict)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [..., dim] of token ids [...]."""
        y = self.original(ids)
        flat_ids, flat = ids.reshape(-1), y.reshape(-1, y.shape[-1])
        own = getattr(self.module, "embed_scale", None)
        for span in self.spans_of(flat_ids.shape[0]).items:
            slot = self.slots.get(span.slot)
            if slot is None:
                continue
            h = F.embedding(flat_ids[span.start : span.end], slot.a.T)  # [rows, rank]
            term = (h @ slot.b.T) * (slot.scale * span.scale)
            if own is not None:
                term = term * own
            rows = flat[span.start : span.end] + term.to(flat.dtype)
            flat = torch.cat([flat[: span.start], rows, flat[span.end :]])
        return flat.view(y.shape)


@dataclass(slots=True)
class ReplacedModule:
    """A module whose parameters an adapter replaces whole on its rows (modules_to_save, biases).

    own: the module's forward from before `attach`; original: the one that other adapters may stand in;
    tokens_of: the tokens of the flat batch in force, None where every leading dimension counts as rows.
    """

    module: nn.Module
    own: Callable[..., torch.Tensor]
    original: Callable[..., torch.Tensor]
    spans_of: SpansOf
    tokens_of: Callable[[], int | None]
    slots: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)
    _inside: bool = False

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The module's output, each span's rows from that adapter's own parameters, at the span's weight."""
        if self._inside:
            return self.own(x, *args, **kwargs)
        lead = x.shape if isinstance(self.module, nn.Embedding) else x.shape[:-1]
        tokens = self.tokens_of()
        rows = lead.numel() if tokens is None else tokens
        spans = [item for item in self.spans_of(rows).items if item.slot in self.slots]
        if len(spans) == 1 and (spans[0].start, spans[0].end) == (0, rows):
            return self._with(spans[0], x, *args, **kwargs)
        y = self.original(x, *args, **kwargs)
        if not spans:
            return y
        axis = 0 if tokens is None else _token_axis(x, len(lead), tokens)
        inputs, out = x.movedim(axis, 0), y.movedim(axis, 0)
        for span in spans:
            part = self._with(span, inputs[span.start : span.end], *args, **kwargs)
            out = torch.cat([out[: span.start], part, out[span.end :]])
        return out.movedim(0, axis)

    def _with(self, span: Span, *args: Any, **kwargs: Any) -> torch.Tensor:
        own = dict(self.module.named_parameters())
        mine = {key: between(own[key], value, span.scale) for key, value in self.slots[span.slot].items()}
        cast = {key: value.to(own[key].dtype) for key, value in mine.items()}
        self._inside = True
        try:
            result: torch.Tensor = torch.func.functional_call(self.module, cast, args, kwargs)
        finally:
            self._inside = False
        return result


def between(own: torch.Tensor, saved: torch.Tensor, weight: float) -> torch.Tensor:
    """W + w (W' - W) in the dtype of W', a parameter that an adapter replaces whole; exactly W' at 1 and W at 0."""
    return saved if weight == 1 else torch.lerp(own.to(saved.dtype), saved, weight)


def _token_axis(x: torch.Tensor, lead: int, tokens: int) -> int:
    """Which of the first `lead` dimensions counts the tokens: a norm of each head sees [1, tokens, heads, dim] or
    [1, heads, tokens, dim]. Where the sizes are equal, tokens are the farther apart in memory."""
    found = [axis for axis in range(lead) if x.shape[axis] == tokens]
    if not found:
        raise InternalError(f"a module saved whole was given {list(x.shape)}, where no dimension has {tokens} tokens")
    return max(found, key=x.stride)


def groups_of(model: nn.Module, path: str) -> tuple[str, ...]:
    """The paths of all projections that share their input with the linear module at `path`, itself included."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    for names in SIBLINGS:
        if name not in names:
            continue
        modules = [parent._modules.get(other) for other in names]
        linears = [module for module in modules if module is not None and kind_of(module) == "linear"]
        if len(linears) == len(names) and len({sizes_of(module)[0] for module in linears}) == 1:
            return tuple(f"{parent_path}.{other}" for other in names)
    return (path,)
