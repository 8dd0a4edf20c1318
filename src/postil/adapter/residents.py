"""The making of a resident adapter from a configuration or a loaded adapter, before any module knows of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from postil.adapter.adapter import Adapter
from postil.adapter.bank import Resident, fill, initialise, make_resident
from postil.adapter.config import LoraConfig
from postil.adapter.targets import Target, find_targets, saved_paths
from postil.adapter.wiring import grouping_of


def resident_of(
    model: PreTrainedModel, name: str, slot: int, source: LoraConfig | Adapter, seed: int, device: torch.device
) -> tuple[Resident, dict[str, tuple[str, ...]]]:
    """The adapter with its values, and the groups that its linear targets lie in (name → member paths).

    The model is only read. Raises AdapterError.
    """
    config = source.config if isinstance(source, Adapter) else source
    targets = find_targets(model, config)
    replaced = replaced_parameters(model, config, targets)
    grouping = grouping_of(model, targets)
    resident = make_resident(name, slot, config, targets, grouping, replaced, device)
    if isinstance(source, Adapter):
        fill(resident, source.tensors, spare=_base_copies(model, source.tensors))
        resident.card = copy.deepcopy(source.card)
    else:
        initialise(resident, replaced, seed)
    return resident, grouping


def replaced_parameters(
    model: PreTrainedModel, config: LoraConfig, targets: Sequence[Target]
) -> dict[str, dict[str, torch.Tensor]]:
    """Module path → the base's parameters that an adapter of this configuration replaces whole."""
    out: dict[str, dict[str, torch.Tensor]] = {}
    saved = saved_paths(model, config)
    for path in saved:
        out[path] = dict(model.get_submodule(path).named_parameters())
    adapted = {target.path for target in targets}
    if config.bias != "none":
        for path, module in model.named_modules():
            bias = module._parameters.get("bias")
            inside = any(path == other or path.startswith(other + ".") for other in saved)
            if bias is not None and not inside and (config.bias == "all" or path in adapted):
                out[path] = {"bias": bias}
    return out


def _base_copies(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Keys that merely repeat a parameter of the base (PEFT saves whole embeddings beside an adapter)."""
    own = dict(model.named_parameters(remove_duplicate=False))
    return [
        key
        for key, tensor in tensors.items()
        if key in own and own[key].shape == tensor.shape and torch.equal(own[key].cpu(), tensor.to(own[key].dtype))
    ]
