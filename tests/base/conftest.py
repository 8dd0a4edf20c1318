"""Tiny model directories, made from configs on the spot, for the tests of base/."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 256 bytes and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    """A Llama of two layers, hidden 32, from a fixed seed."""
    settings: dict[str, Any] = {
        "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


@pytest.fixture
def make_directory(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a tiny Llama (or the model given) with a tokenizer, and says where."""

    def make(
        name: str = "model",
        *,
        model: Any = None,
        dtype: torch.dtype = torch.float32,
        shard: str = "1GB",
        **changes: Any,
    ) -> Path:
        model = model if model is not None else tiny_llama(**changes)
        directory = tmp_path / name
        model.to(dtype).save_pretrained(directory, max_shard_size=shard)
        tiny_tokenizer().save_pretrained(directory)
        return directory

    return make


@pytest.fixture
def directory(make_directory: Callable[..., Path]) -> Path:
    """One tiny float32 Llama directory."""
    return make_directory()
