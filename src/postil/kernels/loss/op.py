"""cross_entropy: head and loss in chunks of rows, the gradient made in the forward pass, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch.autograd.function import once_differentiable

from postil.kernels.loss.chunks import Gradients, chunks, saved
from postil.kernels.loss.reference import Head


def cross_entropy(
    hidden: Float[torch.Tensor, "n d"],
    targets: Int[torch.Tensor, " n"],
    weights: Float[torch.Tensor, " n"],
    head: Head,
    parameters: Sequence[torch.Tensor] = (),
) -> tuple[Float[torch.Tensor, ""], Float[torch.Tensor, " n"]]:
    """(sum of weights · nll, nll per row), nll = logsumexp(z) - z[target] with z = head(rows, start, end).

    hidden: hidden states of the target tokens only; weights: float32 per row (1/target tokens of the step).
    `head` maps rows start..end to logits and is called once per chunk; `parameters` are those of its tensors
    that want a gradient (a trained head, a head's adapter). The first result is differentiable, the second
    (nats per token) is not.
    """
    total, nll = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, targets, weights, head, torch.is_grad_enabled(), *parameters
    )
    return total, nll


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor,
        head: Head,
        recording: bool,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = recording and any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        nll = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        gradients = Gradients.of(hidden, parameters, wanted)
        for start, end in chunks(hidden.shape[0]):
            with torch.set_grad_enabled(wanted):
                chunk = hidden[start:end].detach().requires_grad_(wanted)
                losses = F.cross_entropy(head(chunk, start, end).float(), targets[start:end], reduction="none")
                loss = (losses * weights[start:end]).sum()
            total += loss.detach()
            nll[start:end] = losses.detach()
            gradients.add(start, loss, chunk, parameters)
        gradients.save(ctx)
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: torch.Tensor, _dnll: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dhidden, dparameters = saved(ctx, dtotal)
        return dhidden, None, None, None, None, *dparameters
