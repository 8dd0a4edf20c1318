"""A pack on the model's device, and the spans of the adapter in training over its rows."""

from __future__ import annotations

import torch

from postil.adapter.bank import Resident
from postil.adapter.model import AdaptedModel
from postil.data import Pack
from postil.kernels.layout import Rows, Span, Spans


def to_device(pack: Pack, model: AdaptedModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, positions, loss weights) of a pack as tensors on the model's device."""
    device = model.base.device
    return (
        torch.from_numpy(pack.ids).to(device),
        torch.from_numpy(pack.positions).to(device),
        torch.from_numpy(pack.weights).to(device),
    )


def spans_of(resident: Resident | None, tokens: int) -> Spans:
    """One span of the adapter over a whole pack, without dropout (none where every weight is trained)."""
    return Spans((Span(0, tokens, resident.slot),)) if resident is not None else Spans()


def training_spans(resident: Resident | None, pack: Pack, seed: int) -> Spans:
    """As spans_of, with dropout; seed: of the whole step, whose rows its masks are counted by."""
    if resident is None or not resident.config.dropout:
        return spans_of(resident, len(pack.ids))
    rows = Rows(torch.from_numpy(pack.step_rows).to(resident.flat.device))
    return Spans((Span(0, len(pack.ids), resident.slot, 1.0, seed),), rows)


def shares(model: AdaptedModel, resident: Resident | None) -> bool:
    """Whether the rows of a training pack may have what they begin with in common once: not under dropout, whose mask
    is each row's own."""
    return model.shares_beginnings and not (resident is not None and resident.config.dropout)
