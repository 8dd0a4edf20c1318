"""A tiny frozen base and a handful of samples for the training tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from postil.adapter import AdaptedModel, attach
from postil.data import Sample
from postil.training.defaults import settled
from postil.training.options import Settled, TrainOptions


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


@torch.no_grad()
def tiny_documents(count: int = 12, length: int = 48, seed: int = 0) -> list[Sample]:
    """What the tiny base says by itself at temperature 1: the one general text that it is good at."""
    model = tiny_model().model
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(61, (count, 1), generator=generator)
    while ids.shape[1] < length:
        chances = model(ids, use_cache=False).logits[:, -1].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    weights = np.ones(length, dtype=np.float32)
    weights[0] = 0
    return [Sample(row.numpy().astype(np.int32), weights, number + 1) for number, row in enumerate(ids)]


def options_of(**settings: Any) -> Settled:
    """TrainOptions for the tiny samples, all that is not given chosen from them."""
    return settled(TrainOptions(**settings), tiny_samples())[0]
