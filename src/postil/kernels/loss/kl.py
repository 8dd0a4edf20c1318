"""kl_divergence: how far one model's next-token distributions lie from another's, in chunks of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch.autograd.function import once_differentiable

from postil.kernels.loss.chunks import Gradients, chunks, saved
from postil.kernels.loss.reference import Head


def kl_divergence(
    hidden_p: Float[torch.Tensor, "n d_p"],
    hidden_q: Float[torch.Tensor, "n d_q"],
    head_p: Head,
    head_q: Head,
    parameters: Sequence[torch.Tensor] = (),
) -> tuple[Float[torch.Tensor, ""], Float[torch.Tensor, " n"]]:
    """(sum over rows of KL(p||q), KL per row) in nats, p = softmax(head_p(hidden_p)), q likewise; float32.

    Kullback & Leibler 1951: KL(p||q) = Σ_v p_v (log p_v - log q_v). p is what q is held to (the base): it gets
    no gradient. The first result is differentiable in hidden_q and in `parameters`, those of head_q's tensors
    that want a gradient; the second is not. Both heads are called once per chunk, as in cross_entropy.
    """
    total, rows = _ChunkedKl.apply(  # type: ignore[no-untyped-call]
        hidden_p.detach(), hidden_q, head_p, head_q, torch.is_grad_enabled(), *parameters
    )
    return total, rows


class _ChunkedKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_p: torch.Tensor,
        hidden_q: torch.Tensor,
        head_p: Head,
        head_q: Head,
        recording: bool,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = recording and any(ctx.needs_input_grad)
        kl = torch.empty(hidden_q.shape[0], dtype=torch.float32, device=hidden_q.device)
        gradients = Gradients.of(hidden_q, parameters, wanted)
        buffers: list[torch.Tensor] = []  # four [chunk, vocabulary]: fresh memory costs more than the sums in it
        for start, end in chunks(hidden_q.shape[0]):
            with torch.no_grad():
                logits_p = head_p(hidden_p[start:end], start, end)
            with torch.set_grad_enabled(wanted):
                chunk = hidden_q[start:end].detach().requires_grad_(wanted)
                logits = head_q(chunk, start, end)
            with torch.no_grad():
                buffers = buffers or [torch.empty_like(logits, dtype=torch.float32) for _ in range(4)]
                z_p, p, z_q, q = (buffer[: end - start] for buffer in buffers)
                log_p, log_q = _softmax(logits_p, z_p, p), _softmax(logits.detach(), z_q, q)
                # Σ_v p_v (log p_v - log q_v), log p_v = z_v - log Σ_u exp z_u
                kl[start:end] = z_p.sub_(z_q).mul_(p).sum(-1) - log_p + log_q
                slope = q.sub_(p).to(logits.dtype) if wanted else None  # d KL / d logits of q = q - p
            gradients.add(start, logits, chunk, parameters, slope)
        gradients.save(ctx)
        ctx.mark_non_differentiable(kl)
        return kl.sum(), kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: torch.Tensor, _dkl: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dhidden, dparameters = saved(ctx, dtotal)
        return None, dhidden, None, None, None, *dparameters


def _softmax(logits: torch.Tensor, z: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """Fill z with the logits less their row's largest and `chance` with softmax(logits); returns log Σ exp z [rows].

    A logit of -inf (a word that cannot come) becomes the least finite number: chance 0, and no 0 · inf after it.
    """
    z.copy_(logits)
    z.sub_(z.amax(-1, keepdim=True)).clamp_(min=torch.finfo(torch.float32).min / 4)
    torch.exp(z, out=chance)
    total = chance.sum(-1)
    chance.div_(total[:, None])
    return total.log()
