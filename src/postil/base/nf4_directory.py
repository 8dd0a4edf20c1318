"""Writes a base as a directory of 4-bit weights that transformers and bitsandbytes load (`postil quantize`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from postil.base.fingerprint import NF4, RECORD, compute_source
from postil.base.gguf import config_of, write_directory
from postil.base.load import load_base
from postil.base.nf4_files import to_tensors
from postil.base.nf4_linear import nf4_layers
from postil.base.quantise import QuantisedBytes, is_linear, quantised_bytes
from postil.base.stored import read_config
from postil.errors import BaseModelError
from postil.files import atomic_directory, check_vacant, write_json


def quantise_directory(
    source: str | Path, out: str | Path, *, dtype: str = "auto", trust_remote_code: bool = False
) -> QuantisedBytes:
    """Write the base `source` (what load_base opens) to the directory `out` in NF4; returns what its layers take.

    `out` holds config.json with transformers' quantization_config, the tensors under bitsandbytes' keys, the
    tokenizer, and in postil.json the fingerprint of the dense base, so that adapters fit both. dtype (of all else)
    and trust_remote_code: as in load_base. Written whole or not at all. Raises BaseModelError, also where the source
    is 4-bit already, and StorageError.
    """
    check_vacant(out)
    base = load_base(source, dtype=dtype, quant=NF4, trust_remote_code=trust_remote_code)
    if base.directory is not None and read_config(base.directory).get("quantization_config"):
        raise BaseModelError(f"{source} holds 4-bit weights already: there is nothing to quantise.")
    dense_source = base.fingerprint().source
    with atomic_directory(out) as temporary:
        config = config_of(base.model, base.dtype) | {"quantization_config": settings(base.model, base.dtype)}
        write_directory(
            base.model, base.tokenizer, temporary, dtype=base.dtype, config=config, state=nf4_state(base.model)
        )
        record = {"source": dense_source, "form": NF4, "digest": compute_source(temporary)}
        write_json(temporary / RECORD, {"quantised": record})
    return quantised_bytes(base.model)


def nf4_state(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a 4-bit model under bitsandbytes' keys; tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    layers = dict(nf4_layers(model))
    own = {f"{path}.{name}" for path, layer in layers.items() for name in layer._buffers}
    state = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied and name not in own
    }
    for path, layer in layers.items():
        state |= to_tensors(f"{path}.weight", layer.nf4)
    return state


def settings(model: Any, dtype: torch.dtype) -> dict[str, Any]:
    """config.json's quantization_config, with the fields that transformers writes for bitsandbytes' NF4.

    Every linear layer that is dense is named, so that transformers makes none 4-bit of its own accord.
    """
    dense = [path for path, module in model.named_modules() if is_linear(module)]
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": NF4,
        "bnb_4bit_use_double_quant": True,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": dense,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": "bitsandbytes",
    }
