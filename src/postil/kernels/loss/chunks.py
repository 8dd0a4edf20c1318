"""Losses through the head in chunks of rows: the gradient made in the forward pass, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

CHUNK_ROWS = 256  # logits of one chunk: 256 × vocabulary


def chunks(rows: int) -> Iterator[tuple[int, int]]:
    """(start, end) of every chunk."""
    return ((start, min(start + CHUNK_ROWS, rows)) for start in range(0, rows, CHUNK_ROWS))


@dataclass(slots=True)
class Gradients:
    """What a loss gives to its hidden states (None: nothing is wanted) and to the head's parameters."""

    hidden: torch.Tensor | None
    parameters: list[torch.Tensor | None]

    @classmethod
    def of(cls, hidden: torch.Tensor, parameters: Sequence[torch.Tensor], wanted: bool) -> Gradients:
        """None yet."""
        return cls(torch.empty_like(hidden) if wanted else None, [None] * len(parameters))

    def add(
        self,
        start: int,
        output: torch.Tensor,
        chunk: torch.Tensor,
        parameters: Sequence[torch.Tensor],
        slope: torch.Tensor | None = None,
    ) -> None:
        """Those of one chunk of hidden states, from row `start` on; slope: the loss's gradient at `output`, where
        that is not the loss itself."""
        if self.hidden is None:
            return
        dchunk, *parts = torch.autograd.grad(output, [chunk, *parameters], slope, allow_unused=True)
        self.hidden[start : start + len(chunk)] = dchunk
        for index, part in enumerate(parts):
            known = self.parameters[index]
            if part is not None:
                self.parameters[index] = part if known is None else known + part

    def save(self, ctx: Any) -> None:
        """Keep them for the backward pass."""
        if self.hidden is not None:
            ctx.save_for_backward(self.hidden, *self.parameters)


def saved(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """(of the hidden states, of the parameters) for the loss's own gradient, a number."""
    hidden, *parameters = (None if part is None else part * dloss.to(part.dtype) for part in ctx.saved_tensors)
    assert hidden is not None
    return hidden, parameters
