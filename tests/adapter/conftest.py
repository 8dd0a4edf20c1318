"""Tiny models of every architecture family, from fixed seeds, for the tests of adapter/."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from postil.adapter import AdaptedModel, LoraConfig

COMMON: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 101, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = COMMON | {"num_key_value_heads": 2}
BLOCKS = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2}
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 8,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", GROUPED | {
        "head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", GROUPED | {
        "head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("Phi3Config", GROUPED),
    "phi3-longrope": ("Phi3Config", GROUPED | {
        "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 8}),
    "gpt2": ("GPT2Config", BLOCKS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", COMMON | {"rotary_pct": 0.5}),
    "opt": ("OPTConfig", COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "falcon": ("FalconConfig", BLOCKS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "bloom": ("BloomConfig", BLOCKS | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
}  # fmt: skip

MERGEABLE: dict[str, tuple[str, LoraConfig]] = {
    "linear": ("llama", LoraConfig(target_modules="all-linear")),
    "rslora": ("qwen2", LoraConfig(r=4, use_rslora=True)),
    "conv1d": ("gpt2", LoraConfig(target_modules="all-linear")),
    "embedding": ("llama", LoraConfig(target_modules=("embed_tokens", "q_proj"))),
    "scaled embedding": ("gemma3", LoraConfig(target_modules=("embed_tokens", "q_proj"))),
    "tied head": ("gemma2", LoraConfig(target_modules=("lm_head", "q_proj"))),
    "tied both": ("gemma2", LoraConfig(target_modules=("lm_head", "embed_tokens"))),
    "biases": ("gpt2", LoraConfig(bias="all")),
    "adapted biases": ("qwen2", LoraConfig(bias="lora_only")),
    "saved whole": ("llama", LoraConfig(modules_to_save=("lm_head", "norm"))),
    "saved tied head": ("gpt2", LoraConfig(modules_to_save=("lm_head",))),
}


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """No generation-config lines of transformers in the tests' output."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


def tiny(name: str = "llama", **changes: Any) -> PreTrainedModel:
    """A float32 model of two layers whose every parameter is random, biases and norms too."""
    kind, settings = CONFIGS[name]
    config: PretrainedConfig = getattr(transformers, kind)(**settings | changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def scramble(model: AdaptedModel, name: str = "default", seed: int = 1, size: float = 0.1) -> None:
    """Random values for every tensor of a resident adapter, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for view in model.resident(name).keys.values():
        view.add_(torch.randn(view.shape, generator=generator) * size)


def plain(model: AdaptedModel | PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one sequence through the transformers model."""
    inner = model.model if isinstance(model, AdaptedModel) else model
    with torch.no_grad():
        return inner(input_ids=ids[None], use_cache=False).logits[0]


class Helpers:
    """The functions above, for test modules (which cannot import a conftest)."""

    tiny = staticmethod(tiny)
    scramble = staticmethod(scramble)
    plain = staticmethod(plain)
    ids = torch.arange(3, 15)
    architectures = tuple(CONFIGS)


@pytest.fixture
def lab() -> type[Helpers]:
    """Makers of tiny models and their logits."""
    return Helpers


@pytest.fixture(params=list(CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return str(request.param)


@pytest.fixture(params=MERGEABLE.values(), ids=MERGEABLE)
def mergeable(request: pytest.FixtureRequest) -> tuple[str, LoraConfig]:
    """An architecture and an adapter of each kind that can be merged, in turn."""
    name, config = request.param
    return str(name), config
