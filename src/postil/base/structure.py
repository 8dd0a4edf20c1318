"""Finds the decoder's layers in a transformers model: what is quantised, wrapped and adapted lies there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from postil.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path and the list of the decoder's layers. Raises BaseModelError where there is no such list."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and count:
            return path, module
    raise BaseModelError(
        f"{type(model).__name__} has no list of {count} decoder layers; postil adapts decoder-only models"
    )
