"""Fixtures of the training tests: a tiny frozen base with an adapter, and a handful of samples."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny import tiny_model, tiny_samples

from postil.adapter import AdaptedModel, LoraConfig, attach
from postil.data import Sample


@pytest.fixture
def model() -> AdaptedModel:
    adapted = tiny_model()
    attach(adapted, LoraConfig(r=4, dropout=0.1, target_modules="all-linear"), seed=1)
    return adapted


@pytest.fixture
def samples() -> list[Sample]:
    return tiny_samples()
