"""Tiny random models of four architectures, adapters with every slot full, and a plain greedy reference."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from byte_base import byte_tokenizer
from postil.adapter import Adapter, LoraConfig, attach, detach
from postil.base import Base

VOCABULARY = 260  # 256 bytes and four specials
EOS = 257
SIZES = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 64},
    "gemma2": {
        "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 8, "sliding_window": 12,
        "query_pre_attn_scalar": 8,
    },
    "gpt2": {},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": False},
    "deepseek_v3": {
        "num_key_value_heads": 4, "intermediate_size": 64, "moe_intermediate_size": 32, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
    },
    "diffllama": {"num_key_value_heads": 2, "intermediate_size": 64},
    "openai-gpt": {},
}  # fmt: skip
RANKS = {"one": 1, "four": 4, "eight": 8}


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Every byte is a token, so that most random answers hold halves of characters."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def make_base() -> Callable[..., Base]:
    """make_base(kind, tokenizer=None): a tiny random float32 base, the same at every call."""

    def make(kind: str, tokenizer: Any = None) -> Base:
        config = transformers.AutoConfig.for_model(
            kind, vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, bos_token_id=256, eos_token_id=EOS, pad_token_id=258, **SIZES[kind],
        )  # fmt: skip
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():  # the usual 0.02 would make every token as likely as any other
            if parameter.dim() == 2:
                parameter.data.mul_(6.0)
        model.requires_grad_(False)
        return Base(model, tokenizer, kind)

    return make


@pytest.fixture(scope="session")
def make_adapters() -> Callable[[Base], dict[str, Adapter]]:
    """make_adapters(base): three adapters of ranks 1, 4 and 8 on every linear layer, an untied head included."""

    def make(base: Base) -> dict[str, Adapter]:
        model = attach(base)
        untied = base.model.lm_head.weight is not base.model.get_input_embeddings().weight
        targets = ("all-linear", "lm_head") if untied else ("all-linear",)
        found = {}
        for name, rank in RANKS.items():
            model.add(name, LoraConfig(r=rank, alpha=2.0 * rank, target_modules=targets))
            found[name] = model.export(name)
        detach(model)
        chance = torch.Generator().manual_seed(11)
        for adapter in found.values():
            for key, tensor in adapter.tensors.items():
                adapter.tensors[key] = torch.randn(tensor.shape, generator=chance) * 0.1
        return found

    return make


@pytest.fixture(scope="session")
def merged_greedy() -> Callable[..., tuple[list[int], bool]]:
    """merged_greedy(base, adapter, prompt, count): plain transformers, W + s·B·A, whole forward per token."""

    known: dict[tuple[int, int], tuple[Any, ...]] = {}  # keeps base and adapter, so that their ids stay theirs

    @torch.no_grad()
    def greedy(base: Base, adapter: Adapter | None, prompt: Sequence[int], count: int) -> tuple[list[int], bool]:
        model = known.get((id(base), id(adapter)), (None,))[0]
        if model is None:
            model = copy.deepcopy(base.model)
            if adapter is not None:
                merge(model, adapter)
            known[id(base), id(adapter)] = (model, base, adapter)
        ids = list(prompt)
        for _ in range(count):
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == EOS:
                return ids[len(prompt) :], True
            ids.append(token)
        return ids[len(prompt) :], False

    return greedy


def merge(model: Any, adapter: Adapter) -> None:
    """Add s·B·A to every adapted weight."""
    for path in adapter.modules:
        a, b = (adapter.tensors[f"{path}.lora_{part}.weight"] for part in "AB")
        update = adapter.config.scale_of(path) * (b @ a)
        module = model.get_submodule(path)
        module.weight.data += update if isinstance(module, torch.nn.Linear) else update.T
