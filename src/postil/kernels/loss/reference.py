"""The plain torch form of the loss: all logits at once, cross entropy, weighted sum."""

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
