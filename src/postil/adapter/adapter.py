"""Adapter: a note as plain data, its configuration and tensors by name, apart from any model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from postil.adapter.config import LoraConfig


@dataclass(slots=True)
class Adapter:
    """One adapter outside a model.

    tensors: float tensors by PEFT's keys without their `base_model.model.` prefix, e.g.
    `model.layers.0.self_attn.q_proj.lora_A.weight` [rank, d_in]. base: the fingerprint of the base it
    belongs to ({"source", "form"}; empty where unknown, as in adapters made elsewhere). card: what else
    postil.json holds (recipe, data hashes, template hash, score card, versions).
    """

    config: LoraConfig
    tensors: dict[str, torch.Tensor]
    base: dict[str, str] = field(default_factory=dict)
    base_name: str = ""
    card: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def parameters(self) -> int:
        """The number of numbers in it."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def modules(self) -> list[str]:
        """The paths of the modules that it adapts (not those saved whole), in file order."""
        found = [key.rsplit(".lora_", 1)[0] for key in self.tensors if ".lora_" in key]
        return list(dict.fromkeys(found))

    @property
    def ranks(self) -> dict[str, int]:
        """The rank at each adapted module."""
        out = {}
        for key, tensor in self.tensors.items():
            if ".lora_A." in key or key.endswith(".lora_embedding_A"):
                out[key.rsplit(".lora_", 1)[0]] = int(tensor.shape[0])
        return out
