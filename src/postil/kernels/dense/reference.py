"""The plain torch form of the dense products: in float32, rounded once."""

from __future__ import annotations

import torch
from jaxtyping import Float


def matmul_reference(
    x: Float[torch.Tensor, "*n d_in"],
    weight: Float[torch.Tensor, "d_out d_in"],
    bias: Float[torch.Tensor, " d_out"] | None = None,
) -> Float[torch.Tensor, "*n d_out"]:
    """x W^T + b."""
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def matmul_t_reference(
    g: Float[torch.Tensor, "*n d_out"], weight: Float[torch.Tensor, "d_out d_in"]
) -> Float[torch.Tensor, "*n d_in"]:
    """g W."""
    return (g.float() @ weight.float()).to(g.dtype)
