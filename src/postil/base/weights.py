"""Checks loaded weights: every one found and used, owned, aligned and finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from postil.base.quiet import first_line
from postil.errors import BaseModelError, listed

PIECE = 1 << 20  # values looked at together
ALIGNMENT = 64  # bytes; a vector register's and a cache line's width
# Stored by older versions of transformers, recomputed from the config by newer ones.
HARMLESS = (
    "rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias"
)  # fmt: skip


def check_keys(info: dict[str, Any], place: Path) -> None:
    """Strict loading: every wanted tensor was found, in its shape, and every stored one was used."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise BaseModelError(
            f"{place} lacks {len(missing)} tensors that its architecture wants: {listed(missing)}; "
            "download it again, whole."
        )
    mismatched = sorted(
        f"{name} (stored {list(found)}, wanted {list(wanted)})" for name, found, wanted in info["mismatched_keys"]
    )
    if mismatched:
        raise BaseModelError(
            f"{place} stores {len(mismatched)} tensors in other shapes than its config.json says: "
            f"{listed(mismatched)}."
        )
    unexpected = sorted(key for key in info["unexpected_keys"] if not key.endswith(HARMLESS))
    if unexpected:
        raise BaseModelError(
            f"{place} stores {len(unexpected)} tensors that its architecture does not use: "
            f"{listed(unexpected)}; its config.json may belong to another model."
        )
    if info.get("error_msgs"):
        raise BaseModelError(f"transformers cannot load {place}: {first_line(info['error_msgs'][0])}")


def check_finite(model: torch.nn.Module, place: Path) -> None:
    """Raise BaseModelError naming the tensors with NaN or infinite values."""
    bad = [
        name
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.is_floating_point() and not _finite(tensor)
    ]
    if bad:
        raise BaseModelError(
            f"{place} has weights that are not finite (NaN or infinite) in {listed(bad)}: "
            "download it again, or load it in a wider dtype."
        )


def _finite(tensor: torch.Tensor) -> bool:
    """Piece by piece: torch's own test makes copies of what it looks at."""
    return all(bool(torch.isfinite(piece).all()) for piece in torch.split(tensor.detach().reshape(-1), PIECE))


def own_weights(model: torch.nn.Module) -> None:
    """Make every parameter and buffer own aligned memory of its own size; tied tensors stay tied.

    A loader may hand out views into the mapped file: they change with it, and their odd alignment
    changes the order of sums in a product, and with it the bytes of what is trained.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        if tensor.data_ptr() % ALIGNMENT or not whole or not tensor.is_contiguous():
            tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)
