"""How far an adapted model's next-token distributions lie from its own base's: KL(base||adapted) on a pack."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from jaxtyping import Float, Int

from postil.adapter.model import AdaptedModel
from postil.errors import InternalError
from postil.kernels.layout import Spans
from postil.kernels.loss import kl_divergence
from postil.kernels.loss.reference import Head

Bare = Callable[[], AbstractContextManager[object]]
"""Makes a context in which the model's own parameters are the base's: `nullcontext` wherever they are frozen,
an exchange of values where full fine-tuning moves them."""


def kl_to_base(
    model: AdaptedModel,
    ids: Int[torch.Tensor, " tokens"],
    positions: Int[torch.Tensor, " tokens"],
    rows: Int[torch.Tensor, " n"],
    *,
    bare: Bare = nullcontext,
    base: Float[torch.Tensor, "n d"] | None = None,
) -> tuple[Float[torch.Tensor, ""], Float[torch.Tensor, " n"]]:
    """(sum of KL(base||adapted) over the given rows of a pack, KL per row) in nats, inside `model.using`.

    rows: int64, ascending; the distribution over the token after each of them is compared. The base is the
    model in no span, run first and without gradient (a forward pass more, unless its states on these rows are given
    as `base`); the first result is differentiable in the adapters that are trained, the second is not.
    """
    if base is None:
        base = base_states(model, ids, positions, rows, bare=bare)
    states = model.hidden(ids, positions).index_select(0, rows)
    return kl_divergence(base, states, base_head(model, bare), model.head_on(rows), model.head_parameters())


@torch.no_grad()
def base_states(
    model: AdaptedModel,
    ids: Int[torch.Tensor, " tokens"],
    positions: Int[torch.Tensor, " tokens"],
    rows: Int[torch.Tensor, " n"],
    *,
    bare: Bare = nullcontext,
) -> Float[torch.Tensor, "n d"]:
    """Hidden states of the base alone on these rows, whatever the spans of the Layout in force."""
    if model.layout is None or model.layout.store is not None:
        raise InternalError("base_states() needs a Layout in force, and one without a key-value store")
    with bare(), model.under(replace(model.layout, spans=Spans()), None):
        return model.hidden(ids, positions).index_select(0, rows)


def base_head(model: AdaptedModel, bare: Bare = nullcontext) -> Head:
    """The base's own head, as the loss kernels call it."""

    def head(chunk: torch.Tensor, _start: int, _end: int) -> torch.Tensor:
        with bare():
            return model.logits(chunk, Spans())

    return head
