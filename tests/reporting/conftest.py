"""An adapter as plain data, for pages that tell of one: no model is needed."""

from __future__ import annotations

import pytest
import torch

from postil.adapter import Adapter, LoraConfig


@pytest.fixture
def note() -> Adapter:
    """An adapter of two kinds of modules on two layers, with values that tell apart."""
    generator = torch.Generator().manual_seed(2)
    tensors = {
        f"model.layers.{layer}.{module}.lora_{part}.weight": torch.randn(shape, generator=generator)
        for layer in range(2)
        for module, d_in, d_out in (("self_attn.q_proj", 32, 32), ("mlp.down_proj", 64, 32))
        for part, shape in (("A", (4, d_in)), ("B", (d_out, 4)))
    }
    return Adapter(LoraConfig(r=4, target_modules=("q_proj", "down_proj")), tensors)
