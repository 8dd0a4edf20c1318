"""The plain torch forms of the losses: all logits at once, cross entropy or KL divergence, and the sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int

Head = Callable[[torch.Tensor, int, int], torch.Tensor]


def cross_entropy_reference(
    hidden: Float[torch.Tensor, "n d"],
    targets: Int[torch.Tensor, " n"],
    weights: Float[torch.Tensor, " n"],
    head: Head,
    parameters: Sequence[torch.Tensor] = (),
) -> tuple[Float[torch.Tensor, ""], Float[torch.Tensor, " n"]]:
    """(sum of weights · nll, nll per row) with nll = logsumexp(z) - z[target], z = head(hidden), in float32."""
    logits = head(hidden, 0, hidden.shape[0]).float()
    nll = F.cross_entropy(logits, targets, reduction="none")
    return (nll * weights).sum(), nll.detach()


def kl_divergence_reference(
    hidden_p: Float[torch.Tensor, "n d_p"],
    hidden_q: Float[torch.Tensor, "n d_q"],
    head_p: Head,
    head_q: Head,
    parameters: Sequence[torch.Tensor] = (),
) -> tuple[Float[torch.Tensor, ""], Float[torch.Tensor, " n"]]:
    """(sum over rows of KL(p||q), KL per row), KL = Σ_v p_v (log p_v - log q_v), in float32; no gradient to p."""
    with torch.no_grad():
        p = torch.log_softmax(head_p(hidden_p, 0, hidden_p.shape[0]).float(), dim=-1)
    q = torch.log_softmax(head_q(hidden_q, 0, hidden_q.shape[0]).float(), dim=-1)
    kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    return kl.sum(), kl.detach()
