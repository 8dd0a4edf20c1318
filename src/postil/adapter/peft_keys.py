"""PEFT's names of an adapter's tensors: postil's keys from and to them, and what a set of tensors must hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from postil.adapter.config import LoraConfig
from postil.errors import AdapterError, listed

PREFIX = "base_model.model."
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")


def peft_key(key: str, modules: set[str]) -> str:
    """PEFT's key for one of postil's: the base's own parameters of an adapted module (`modules`) lie under PEFT's
    wrapper as `base_layer`."""
    path, _, name = key.rpartition(".")
    return PREFIX + (f"{path}.base_layer.{name}" if path in modules and name in ("bias", "weight") else key)


def saved_modules(config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The full paths of the modules saved whole: PEFT takes names as endings without a dot ("norm" is
    input_layernorm too), so that names alone would mean other modules there."""
    found = set()
    for key in tensors:
        if ".lora_" in key:
            continue
        parts = key.split(".")[:-1]
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if any(path == name or path.endswith("." + name) for name in config.modules_to_save or ()):
                found.add(path)
                break
    return sorted(found)


def _normal_key(key: str) -> str | None:
    """postil's key for a key of PEFT's; None for what PEFT itself never uses (originals of saved modules)."""
    key = key.removeprefix(PREFIX)
    if ".original_module." in key:
        return None
    key = re.sub(r"\.modules_to_save\.(default\.)?", ".", key)
    key = re.sub(r"\.base_layer\.(weight|bias)$", r".\1", key)
    key = re.sub(r"\.lora_([AB])\.[^.]+\.weight$", r".lora_\1.weight", key)
    return re.sub(r"\.lora_embedding_([AB])\.[^.]+$", r".lora_embedding_\1", key)


def normalised(raw: Mapping[str, torch.Tensor], config: LoraConfig, file: Path) -> dict[str, torch.Tensor]:
    """The tensors read from `file` under postil's keys, every one understood. Raises AdapterError naming keys."""
    tensors: dict[str, torch.Tensor] = {}
    adapted = {key.rsplit(".lora_", 1)[0] for key in map(_normal_key, raw) if key and ".lora_" in key}
    strange = []
    for key, value in raw.items():
        plain = _normal_key(key)
        if plain is None:
            continue
        if plain in tensors and torch.equal(tensors[plain], value):
            continue  # PEFT writes the bias of a module saved whole twice with bias "all"
        if plain in tensors:
            raise AdapterError(f"{file}: two tensors mean {plain}; save the adapter anew, one adapter a directory")
        if not _understood(plain, config, adapted):
            strange.append(key)
        tensors[plain] = value
    if strange:
        raise AdapterError(
            f"{file}: {len(strange)} keys are no part of the adapter that adapter_config.json describes: "
            f"{listed(strange)}; they would be lost without a word, so save the adapter anew"
        )
    if not adapted:
        raise AdapterError(f"{file} holds no lora_A and lora_B tensors; save the adapter anew, from a trained model")
    _check_pairs(tensors, config, adapted, file)
    check_values(tensors, str(file))
    return tensors


def _understood(key: str, config: LoraConfig, adapted: set[str]) -> bool:
    path, _, name = key.rpartition(".")
    if re.search(r"\.(lora_[AB]\.weight|lora_embedding_[AB])$", key):
        return True
    if ".lora_" in key:
        return False
    if name == "bias" and config.bias != "none" and (config.bias == "all" or path in adapted):
        return True
    if name == "weight" and path.rsplit(".", 1)[-1] in _EMBEDDINGS:
        return True  # save_embedding_layers writes the base's own; attaching checks that it is the base's
    parts = path.split(".")
    owners = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(owner.endswith(saved) for owner in owners for saved in config.modules_to_save or ())


def _check_pairs(tensors: Mapping[str, torch.Tensor], config: LoraConfig, adapted: set[str], file: Path) -> None:
    for path in sorted(adapted):
        kind = "lora_embedding_{}" if f"{path}.lora_embedding_A" in tensors else "lora_{}.weight"
        keys = [f"{path}.{kind.format(side)}" for side in "AB"]
        missing = [key for key in keys if key not in tensors]
        if missing:
            raise AdapterError(f"{file}: {listed(missing)} is missing; copy the adapter again, whole")
        a, b = (tensors[key] for key in keys)
        rank = config.rank_of(path)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise AdapterError(
                f"{file}: {path} has A {list(a.shape)} and B {list(b.shape)}, but adapter_config.json gives it rank "
                f"{rank}; the two files are not of one adapter"
            )


def check_values(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raise AdapterError for a tensor that is not floating point or not finite."""
    for key, value in tensors.items():
        if not value.is_floating_point():
            raise AdapterError(f"{where}: {key} is {value.dtype}, not floating point; save the adapter anew")
        if not bool(torch.isfinite(value).all()):
            raise AdapterError(f"{where}: {key} holds NaN or infinite values; the adapter is broken, train it again")
