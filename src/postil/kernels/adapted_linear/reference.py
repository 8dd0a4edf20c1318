"""The plain torch form of adapted_linear: the equation, span by span, differentiated by autograd."""

from __future__ import annotations

import torch
from jaxtyping import Float

from postil.kernels.adapted_linear.op import Group, drop
from postil.kernels.layout import Spans


def adapted_linear_reference(
    x: Float[torch.Tensor, "tokens d_in"], group: Group, spans: Spans
) -> tuple[Float[torch.Tensor, "tokens d_out"], ...]:
    """y_j = x W_j^T + b_j + s_i (x A_ij^T) B_ij^T on the rows of span i (Hu et al. 2021, equation 3)."""
    outputs = []
    for j, member in enumerate(group.members):
        y = member.matmul(x)
        for span in spans.items:
            slot = group.slots.get(span.slot)
            if slot is None:
                continue
            rows = slice(span.start, span.end)
            low, high = slot.ranges()[j]
            b, bias = slot.b[j], slot.biases[j]
            term = torch.zeros_like(y[rows])
            if b is not None:
                a = slot.a[low:high].to(x.dtype)
                h = drop(x[rows], group, j, slot, spans, span) @ a.T
                term = term + span.scale * slot.scales[j] * (h @ b.to(x.dtype).T)
            if bias is not None:
                assert member.bias is not None
                term = term + span.scale * (bias - member.bias).to(x.dtype)
            y = torch.cat([y[: span.start], y[rows] + term, y[span.end :]])
        outputs.append(y)
    return tuple(outputs)
