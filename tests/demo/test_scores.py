"""The demo's losses: a gain with its interval, each row's loss as it has alone, and enough general text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from postil.adapter import AdaptedModel, LoraConfig, attach
from postil.base import load_base
from postil.data import Sample
from postil.demo import scores
from postil.demo.run import BASE, GENERAL_TOKENS
from postil.demo.scores import gain, general_windows, mean_nats, row_losses


def test_a_gain_is_the_mean_of_rows_with_its_interval() -> None:
    base = [(4.0, 2), (9.0, 3), (2.0, 1), (8.0, 2)]
    adapted = [(2.0, 2), (3.0, 3), (1.0, 1), (2.0, 2)]  # better by 1, 2, 1 and 3 nats per token
    found = gain(base, adapted)
    half = 1.96 * np.std([1, 2, 1, 3], ddof=1) / 2
    assert (found.mean, found.low, found.high) == pytest.approx((1.75, 1.75 - half, 1.75 + half))
    assert found.real


def test_a_gain_is_real_only_where_its_interval_lies_above_zero() -> None:
    noisy = [(1.0, 1), (5.0, 1), (1.0, 1), (5.0, 1)]
    found = gain(noisy, [(2.0, 1), (2.0, 1), (2.0, 1), (4.5, 1)])
    assert found.mean > 0 > found.low
    assert not found.real
    assert not gain([(1.0, 1), (1.1, 1)], [(2.0, 1), (2.0, 1)]).real
    assert not gain(noisy, noisy).real


def test_mean_nats_weighs_by_tokens() -> None:
    assert mean_nats([(4.0, 1), (2.0, 5)]) == 1.0


@pytest.fixture
def model() -> AdaptedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=61, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    adapted = attach(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
    attach(adapted, LoraConfig(r=4), name="note", seed=1)
    resident = adapted.resident("note")
    with torch.no_grad():
        resident.flat.add_(0.05 * torch.randn(resident.flat.shape, generator=torch.Generator().manual_seed(2)))
    return adapted


def test_row_losses_are_those_of_each_row_alone(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    samples = []
    for row in range(9):
        length = int(random.integers(3, 17))
        weights = (random.random(length) < 0.6).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        samples.append(Sample(random.integers(0, 61, length).astype(np.int32), weights, row + 1))
    monkeypatch.setattr(scores, "PACK_TOKENS", 40)  # several packs
    found = {adapter: row_losses(model, samples, adapter) for adapter in (None, "note")}
    for adapter, losses in found.items():
        model.active = {} if adapter is None else {adapter: 1.0}
        for sample, (total, count) in zip(samples, losses, strict=True):
            with torch.no_grad():
                logits = model.model(torch.from_numpy(sample.ids.astype(np.int64))[None]).logits[0]
            logs = logits.double().log_softmax(-1)
            wanted = [-float(logs[t - 1, sample.ids[t]]) for t in range(1, len(sample.ids)) if sample.weights[t]]
            assert count == len(wanted)
            assert total == pytest.approx(sum(wanted), rel=1e-5)
    assert mean_nats(found[None]) != pytest.approx(mean_nats(found["note"]), rel=1e-3)


@pytest.mark.base
def test_there_is_enough_general_text_for_the_real_tokenizer() -> None:
    windows = general_windows(attach(load_base(BASE)), GENERAL_TOKENS)
    assert sum(len(window.ids) for window in windows) >= 8_000
    assert max(len(window.ids) for window in windows) <= 512
    assert all(window.weights[0] == 0 and window.weights[1:].all() for window in windows)
