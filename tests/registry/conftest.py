"""Judged adapter directories, as small as they can be, and the registry that they go into."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from cards import card
from postil.adapter import Adapter, LoraConfig
from postil.adapter.identity import update_card
from postil.adapter.peft_files import save_adapter
from postil.registry import Registry


def small(seed: int) -> Adapter:
    """An adapter of one module, r = 2, whose values follow from the seed."""
    draw = torch.Generator().manual_seed(seed)
    key = "model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {key.format("A"): torch.randn(2, 8, generator=draw), key.format("B"): torch.randn(8, 2, generator=draw)}
    base = {"source": "sha256:base", "form": "fp32"}
    return Adapter(LoraConfig(r=2, target_modules=("q_proj",)), tensors, base, "a-base")


@pytest.fixture
def judged(tmp_path: Path) -> Callable[..., Path]:
    """judged(seed, nats=…, …): the directory of an adapter whose card fits its bytes."""

    def make(seed: int = 0, **measures: Any) -> Path:
        place = save_adapter(small(seed), tmp_path / f"runs/{seed}/adapter")
        update_card(place, score_card=card(bytes_of=place, **measures).model_dump(mode="json"))
        return place

    return make


@pytest.fixture
def unjudged(tmp_path: Path) -> Path:
    """An adapter directory without a score card."""
    return save_adapter(small(7), tmp_path / "unjudged/adapter")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A registry that does not exist yet."""
    return Registry(tmp_path / "registry")
