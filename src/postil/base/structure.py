"""Finds the decoder's layers in a transformers model: what is quantised, wrapped and adapted lies there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from postil.errors import BaseModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The path and the list of the decoder's layers. Raises BaseModelError where there is no such list.

    Of several lists of the right length it is the one whose members attend, and then the one of the most modules:
    not a projection, an embedding or a norm for each layer.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and count
    ]
    if not found:
        raise BaseModelError(
            f"{type(model).__name__} has no list of {count} decoder layers; postil adapts decoder-only models"
        )
    return max(found, key=lambda item: _weight_of(item[1]))  # the first of equals


def _weight_of(layers: nn.ModuleList) -> tuple[bool, int]:
    inside = list(layers.modules())
    return any(hasattr(module, "layer_idx") for module in inside), len(inside)
