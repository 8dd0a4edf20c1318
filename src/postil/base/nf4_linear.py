"""Nf4Linear: a frozen linear layer that keeps its weight in 4-bit NF4 codes, dequantised tile by tile in products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from postil.errors import InternalError
from postil.kernels.nf4 import Nf4Weight, dequantise, matmul, matmul_t

TENSORS = ("packed", "absmax", "nested_absmax", "offset", "nested_quant_map")


class Nf4Linear(nn.Module):
    """y = x W^T + b with W [d_out, d_in] in NF4 (QLoRA, Dettmers et al. 2023, equation 5), no gradient to W.

    Buffers, from `fill` on: those of Nf4Weight (`packed`, `absmax`, …), never cast. `bias`: a frozen parameter as
    stored, or None. `conv1d`: it stands in for a Conv1D, whose weight is stored as [d_in, d_out].
    """

    bias: nn.Parameter | None

    def __init__(self, d_in: int, d_out: int, bias: nn.Parameter | None, *, conv1d: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.conv1d = d_in, d_out, conv1d
        self.register_parameter("bias", bias)
        self._facts: dict[str, Any] = {}  # what Nf4Weight holds besides tensors

    def fill(self, w: Nf4Weight) -> None:
        """Take the weight's tensors as buffers."""
        if w.shape != (self.out_features, self.in_features):
            raise InternalError(f"a 4-bit weight {list(w.shape)} for {self.extra_repr()}")
        for name in TENSORS:
            self.register_buffer(name, getattr(w, name))
        self._facts = {
            "shape": w.shape, "dtype": w.dtype, "blocksize": w.blocksize, "nested_blocksize": w.nested_blocksize
        }  # fmt: skip

    @property
    def nf4(self) -> Nf4Weight:
        """The weight: codes and scales where they lie now."""
        if not self._facts:
            raise InternalError("a 4-bit layer was used before it had its weight")
        tensors: dict[str, Any] = dict(self._buffers)
        return Nf4Weight(**tensors, **self._facts)

    def dense(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The whole weight dequantised, in the orientation that the layer it stands in for has."""
        weight = dequantise(self.nf4, dtype)
        return weight.T.contiguous() if self.conv1d else weight

    def matmul(self, x: Float[torch.Tensor, "*n d_in"]) -> Float[torch.Tensor, "*n d_out"]:
        """x W^T + b in x's dtype; gradients flow to x (and to a bias that stands in for the own one)."""
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return matmul(x.reshape(-1, self.in_features), self.nf4, bias).view(*x.shape[:-1], self.out_features)

    def matmul_t(self, g: Float[torch.Tensor, "*n d_out"]) -> Float[torch.Tensor, "*n d_in"]:
        """g W in g's dtype."""
        return matmul_t(g.reshape(-1, self.out_features), self.nf4).view(*g.shape[:-1], self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + b."""
        return self.matmul(x)

    def extra_repr(self) -> str:
        """As nn.Linear says it, and the form."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, nf4"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Nf4Linear:
        """Moved with the model, but never cast with it: `model.half()` would destroy the scales."""
        before = {name: tensor for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self


def nf4_layers(model: nn.Module) -> Iterator[tuple[str, Nf4Linear]]:
    """(path, layer) of every 4-bit layer, in the model's order."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, Nf4Linear))


def logical_parameters(model: nn.Module) -> int:
    """The number of parameters of the model, a 4-bit weight counted by the values that it stands for."""
    plain = sum(parameter.numel() for parameter in model.parameters())
    return plain + sum(layer.in_features * layer.out_features for _, layer in nf4_layers(model))
