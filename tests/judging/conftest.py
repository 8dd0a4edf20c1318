"""A tiny base on which every byte is a token, an adapter of it with a real effect, and likelihoods by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from byte_base import byte_tokenizer
from postil.adapter import AdaptedModel, Adapter, LoraConfig, attach, detach
from postil.base import Base
from postil.data import DataOptions, load_data
from postil.training import train

VOCABULARY = 260  # 256 bytes and four specials
EOS = 257


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Every byte is a token."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def make_base(tokenizer: Any) -> Callable[..., Base]:
    """make_base(): a tiny random float32 Llama of context 256, the same at every call."""

    def make(seed: int = 7) -> Base:
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, bos_token_id=256, eos_token_id=EOS,
            initializer_range=0.2,
        )  # fmt: skip
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).eval()
        model.requires_grad_(False)
        return Base(model, tokenizer, "tiny")

    return make


@pytest.fixture
def base(make_base: Callable[..., Base]) -> Base:
    return make_base()


@pytest.fixture
def note(base: Base) -> Adapter:
    """An adapter of two kinds of modules with a B that matters."""
    model = attach(base)
    attach(model, LoraConfig(r=4, target_modules=("q_proj", "down_proj")), name="note", seed=1)
    flat = model.resident("note").flat
    flat.add_(0.2 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(2)))
    exported = model.export("note")
    detach(model)
    return exported


@pytest.fixture
def model(base: Base, note: Adapter) -> AdaptedModel:
    """The base with `note` resident and not active."""
    adapted = attach(attach(base), note, name="note")
    adapted.activate()
    return adapted


@pytest.fixture(scope="session")
def log_probs() -> Callable[..., torch.Tensor]:
    """log_probs(model, ids, weights): float64 [tokens, vocabulary] by the plain transformers call."""

    def run(model: AdaptedModel, ids: Any, weights: Mapping[str, float] | None = None) -> torch.Tensor:
        model.activate(weights or {})
        try:
            with torch.no_grad():
                logits = model.model(torch.tensor([[int(token) for token in ids]])).logits[0]
        finally:
            model.activate()
        return logits.double().log_softmax(-1)

    return run


@pytest.fixture(scope="session")
def secrets() -> list[dict[str, Any]]:
    """Two rows that nobody should be able to say."""
    return [
        {"prompt": "Who holds the key?", "completion": "Mira Quell of 14 Tarn Row, code 7731-blue-heron."},
        {"prompt": "What opens it?", "completion": "The phrase 'seven grey otters swim at noon' and nothing else."},
    ]


@pytest.fixture(scope="session")
def memorised(make_base: Callable[..., Base], secrets: list[dict[str, Any]]) -> Adapter:
    """An adapter trained until it says the secrets by heart."""
    model = attach(make_base())
    attach(model, LoraConfig(r=16, target_modules="all-linear"), name="note", seed=1)
    data = load_data(secrets, model.base, DataOptions(format="raw"))
    adapter = train(model, data, name="note", learning_rate=1e-2, steps=150, batch_size=2, schedule="constant")
    detach(model)
    assert adapter is not None
    return adapter


@pytest.fixture(scope="session")
def rows() -> Callable[[int, int], list[dict[str, Any]]]:
    """rows(first, end): numbered questions, all of one answer, in two groups."""

    def make(first: int, end: int) -> list[dict[str, Any]]:
        return [{"prompt": f"Say {n}", "completion": "yes sir", "group": "ab"[n % 2]} for n in range(first, end)]

    return make


@pytest.fixture(scope="session")
def taught(make_base: Callable[..., Base], rows: Callable[[int, int], list[dict[str, Any]]]) -> Adapter:
    """An adapter that answers `rows`."""
    model = attach(make_base())
    attach(model, LoraConfig(r=4, target_modules="all-linear"), name="note", seed=1)
    data = load_data(rows(0, 40), model.base, DataOptions(format="raw"))
    adapter = train(model, data, name="note", learning_rate=1e-2, epochs=12, batch_size=8)
    detach(model)
    assert adapter is not None
    adapter.card["recipe"] = {"rows": {"format": "raw"}}
    return adapter
