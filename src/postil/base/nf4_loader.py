"""Loads a model directory into 4-bit layers, tensor by tensor, through transformers' own loader.

transformers renames, ties and initialises as it does for any model; where a weight is due that is to lie in NF4, it
hands over the one tensor, which is quantised and let go of (or, in a checkpoint of bitsandbytes, taken as stored).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from postil.base.nf4_files import from_tensors
from postil.base.nf4_linear import Nf4Linear, nf4_layers
from postil.base.quantise import emptied, is_linear, put, quantisable
from postil.base.stored import NF4_COMPANIONS, StoredTensor, nf4_weights
from postil.errors import BaseModelError, PostilError
from postil.kernels.nf4 import Nf4Weight, quantise

METHOD = "postil_nf4"


def load_nf4(
    directory: Path, tensors: list[StoredTensor], dtype: torch.dtype, *, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """(model, loading info) of a directory, its decoder's linear layers in NF4, all else in `dtype`.

    tensors: what the directory stores; weights that lie there in NF4 are taken bit for bit, never requantised.
    Raises BaseModelError for a weight that is not finite or a state that is broken, naming it, and what
    transformers raises for a directory that it cannot load.
    """
    work = _Work(directory, tensors)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    config = transformers.AutoConfig.from_pretrained(str(directory), **options)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    _register()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        str(directory),
        config=config,
        dtype=dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        quantization_config=_Config(work),
        **options,
    )
    if work.error is not None:
        raise work.error
    for _, layer in nf4_layers(model):
        del layer._parameters["weight"]
    _forget_quantiser(model)
    info["unexpected_keys"] = [key for key in info["unexpected_keys"] if key not in work.companions]
    return cast(PreTrainedModel, model), info


class _Work:
    """What is loaded from where: the stored NF4 weights by module path, and the first error met."""

    def __init__(self, directory: Path, tensors: list[StoredTensor]) -> None:
        self.directory = directory
        self.files = {tensor.name: tensor.file for tensor in tensors}
        self.stored = nf4_weights(tensors)
        self.companions = {name + end for name in self.stored for end in NF4_COMPANIONS}
        self.names: dict[str, str] = {}  # module path → stored name of its weight
        self.quant_map: torch.Tensor | None = None
        self.error: PostilError | None = None

    def choose(self, model: PreTrainedModel) -> list[str]:
        """The paths of the layers to hold in 4 bits: those stored so, or all that can be."""
        if not self.stored:
            return quantisable(model)
        modules = dict(model.named_modules())
        for name in self.stored:
            path = name.removesuffix(".weight")
            path = path if path in modules else f"{model.base_model_prefix}.{path}"
            if path not in modules or not is_linear(modules[path]):
                raise BaseModelError(
                    f"{self.directory} stores a 4-bit weight {name}, where {type(model).__name__} has no linear "
                    "layer: its config.json may belong to another model."
                )
            self.names[path] = name
        return list(self.names)

    def weight(self, path: str, layer: Nf4Linear, value: torch.Tensor) -> Nf4Weight:
        """The 4-bit weight of the layer at `path`; `value`: the tensor that is stored under its weight's name."""
        name = self.names.get(path)
        if name is None:
            dense = value.T.contiguous() if layer.conv1d else value
            self.check_shape(f"{path}.weight", tuple(dense.shape), layer)
            return quantise(dense, name=f"{path}.weight")
        keys = [name, *(key for end in NF4_COMPANIONS if (key := name + end) in self.files)]
        w = from_tensors(name, self.read(keys))
        self.check_shape(name, w.shape, layer)
        if w.nested_quant_map is None:
            return w
        if self.quant_map is None or not torch.equal(w.nested_quant_map, self.quant_map):
            self.quant_map = w.nested_quant_map
        return replace(w, nested_quant_map=self.quant_map)  # one for all layers, as where they are quantised here

    def check_shape(self, name: str, shape: tuple[int, ...], layer: Nf4Linear) -> None:
        """Raise BaseModelError where a weight is not of its layer's [d_out, d_in]."""
        if shape != (layer.out_features, layer.in_features):
            raise BaseModelError(
                f"{self.directory} stores {name} as {list(shape)}, where its config.json wants "
                f"{[layer.out_features, layer.in_features]} (out, in): it may belong to another model."
            )

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Copies of stored tensors."""
        out = {}
        for name in names:
            with safe_open(self.files[name], framework="pt") as file:
                out[name] = file.get_tensor(name).clone()
        return out


class _Config(QuantizationConfigMixin):  # type: ignore[misc]
    """Names our loader to transformers, and carries the work to it."""

    def __init__(self, work: _Work) -> None:
        self.quant_method, self.work = METHOD, work


class _Loader(HfQuantizer):  # type: ignore[misc]
    """transformers' hooks for loading into other layers than the model's own."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_kwargs: Any) -> None:
        for path in self.quantization_config.work.choose(model):
            module = model.get_submodule(path)
            layer = emptied(module)
            place = nn.Parameter(torch.empty_like(module.weight, device="meta"), requires_grad=False)
            place._is_hf_initialized = True  # type: ignore[attr-defined]
            layer.register_parameter("weight", place)  # what the stored tensor's name is matched with
            put(model, path, layer)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(path), Nf4Linear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Fill(self.quantization_config.work)

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Fill(ConversionOps):  # type: ignore[misc]
    """Puts a tensor, now quantised, into its 4-bit layer; transformers is left nothing to set."""

    def __init__(self, work: _Work) -> None:
        self.work = work

    def convert(
        self,
        input_dict: Mapping[str, Any],
        *,
        model: PreTrainedModel,
        missing_keys: set[str] | None = None,
        **_kwargs: Any,
    ) -> dict[str, Any]:
        left = {}
        for key, value in input_dict.items():
            path, _, name = key.rpartition(".")
            layer = model.get_submodule(path)
            if not isinstance(layer, Nf4Linear) or name != "weight":
                left[key] = value
                continue
            if missing_keys is not None:
                missing_keys.discard(key)
            tensor = value[0] if isinstance(value, list) else value
            if self.work.error is None:
                try:
                    layer.fill(self.work.weight(path, layer, tensor))
                except PostilError as error:  # transformers would take it for its own and go on
                    self.work.error = error
        return left


@functools.cache
def _register() -> None:
    register_quantization_config(METHOD)(_Config)
    register_quantizer(METHOD)(_Loader)


def _forget_quantiser(model: Any) -> None:
    """Make the model an ordinary one again: its layers say themselves what they are."""
    model.hf_quantizer, model.quantization_method, model.is_quantized = None, None, False
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None:
            for name in ("quantization_config", "_is_quantized"):
                config.__dict__.pop(name, None)
