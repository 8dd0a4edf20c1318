"""Chooses the layers of a base that are held in NF4, makes them so, and counts what that saves."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from postil.base.nf4_linear import Nf4Linear, nf4_layers
from postil.base.structure import decoder_layers
from postil.errors import BaseModelError
from postil.kernels.nf4 import quantise

ROUTERS = ("router", "gate", "shared_expert_gate")  # a token's experts hang on small differences of their logits


@dataclass(frozen=True, slots=True)
class QuantisedBytes:
    """Bytes of the 4-bit layers' weights as they lie (codes and all scales), and of the same weights in bfloat16."""

    layers: int
    nf4: int
    bf16: int

    @property
    def share(self) -> float:
        """nf4 over bf16: 0.258 for large layers (4.127 of 16 bits)."""
        return self.nf4 / max(self.bf16, 1)


def quantised_bytes(model: nn.Module) -> QuantisedBytes:
    """What the 4-bit layers of a model take, and what they would take in bfloat16; biases left out."""
    layers = [layer for _, layer in nf4_layers(model)]
    values = sum(layer.in_features * layer.out_features for layer in layers)
    held = {tensor.data_ptr(): tensor.nbytes for layer in layers for tensor in layer.buffers()}  # one map for all
    return QuantisedBytes(len(layers), sum(held.values()), 2 * values)


def is_quantised(model: nn.Module) -> bool:
    """Whether any layer of the model is held in NF4."""
    return next(nf4_layers(model), None) is not None


def quantisable(model: PreTrainedModel) -> list[str]:
    """The paths of the linear layers that are held in NF4: nn.Linear and Conv1D within the decoder's layers.

    Left as stored: embeddings, head, norms, routers, experts in 3-D parameters, layers with a forward of their
    own, and what the model keeps in float32. Raises BaseModelError where nothing is left.
    """
    prefix, _ = decoder_layers(model)
    kept = list(model._keep_in_fp32_modules or ())
    found = [
        path
        for path, module in model.named_modules()
        if path.startswith(f"{prefix}.")
        and is_linear(module)
        and path.rpartition(".")[2] not in ROUTERS
        and (not kept or should_convert_module(path, kept))
    ]
    if not found:
        raise BaseModelError(
            f"{type(model).__name__} has no linear layers that can be held in 4 bits: load it without quant"
        )
    return found


def is_linear(module: nn.Module) -> bool:
    """Whether the module is torch's linear layer or GPT-2's Conv1D itself, no subclass with its own arithmetic."""
    return type(module) in (nn.Linear, Conv1D)


def emptied(module: nn.Module) -> Nf4Linear:
    """A 4-bit layer, not yet filled, in place of a linear one; the bias is the same parameter."""
    assert isinstance(module, nn.Linear | Conv1D)
    conv1d = isinstance(module, Conv1D)
    first, second = module.weight.shape
    d_in, d_out = (first, second) if conv1d else (second, first)
    return Nf4Linear(int(d_in), int(d_out), module.bias, conv1d=conv1d)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Make `module` the submodule at `path`."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


@torch.no_grad()
def quantise_model(model: PreTrainedModel) -> None:
    """Replace the linear layers of a model in memory by 4-bit ones, one at a time, each dense weight let go of.

    Raises BaseModelError for a weight with NaN or infinite values, naming it.
    """
    for path in quantisable(model):
        module = model.get_submodule(path)
        layer = emptied(module)
        weight = module.weight.detach()
        assert isinstance(weight, torch.Tensor)
        layer.fill(quantise(weight.T.contiguous() if layer.conv1d else weight, name=f"{path}.weight"))
        put(model, path, layer.train(module.training))


@torch.no_grad()
def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """A dense copy of a 4-bit model: every 4-bit weight dequantised in its own dtype, all else shared with it."""
    with torch.device("meta"):
        twin = type(model)(copy.deepcopy(model.config))
    layers = dict(nf4_layers(model))
    own = dict(model.named_parameters(remove_duplicate=False))
    for path, module in twin.named_modules():
        for name in module._parameters:
            key = f"{path}.{name}" if path else name
            if module._parameters[name] is None:
                continue
            if name == "weight" and path in layers:
                module._parameters[name] = nn.Parameter(layers[path].dense(), requires_grad=False)
            else:
                module._parameters[name] = own[key]
        source = model.get_submodule(path)
        for name in module._buffers:
            module._buffers[name] = source._buffers[name]
    twin.generation_config = model.generation_config
    twin._weight_conversions = getattr(model, "_weight_conversions", None)  # how its names are written to files
    return twin.eval()
