"""A tiny frozen base and a handful of samples for the training tests."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from postil.adapter import AdaptedModel, attach
from postil.data import Sample


def tiny_model(seed: int = 0) -> AdaptedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return attach(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())


def tiny_samples(count: int = 23, seed: int = 0) -> list[Sample]:
    random = np.random.default_rng(seed)
    samples = []
    for row in range(count):
        length = int(random.integers(3, 17))
        weights = (random.random(length) < 0.6).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        samples.append(Sample(random.integers(0, 61, length).astype(np.int32), weights, row + 1))
    return samples
