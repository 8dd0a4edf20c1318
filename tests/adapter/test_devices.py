"""A walk with every tensor of the model on `meta`: a tensor of ours that lies elsewhere, or is read back, raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from postil.adapter import AdaptedModel, LoraConfig
from postil.base import Base
from postil.engine.cache import KeyValueStore
from postil.errors import AdapterError
from postil.kernels.layout import Layout, Rows, Segment, Span, Spans
from postil.kernels.nf4 import Nf4Weight, matmul, matmul_t
from postil.training import TrainOptions
from postil.training.defaults import settled
from postil.training.optimizer import AdamW, AdapterWeights

META = torch.device("meta")
LENGTHS = [10, 14]
IDS, POSITIONS = torch.zeros(24, dtype=torch.int64, device=META), torch.zeros(24, dtype=torch.int64, device=META)


def on_meta(config: LoraConfig | None, **changes: Any) -> AdaptedModel:
    settings = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip
    with META:
        model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**settings | changes), dtype=torch.bfloat16)
    adapted = AdaptedModel(Base(model.eval().requires_grad_(False), None, "meta"))
    if config is not None:
        adapted.add("a", config).train()
    return adapted


CONFIGS = {
    "all linear": LoraConfig(r=4, dropout=0.1, target_modules="all-linear"),
    "head and embedding": LoraConfig(r=4, dropout=0.1, target_modules=("lm_head", "embed_tokens", "q_proj")),
    "saved whole": LoraConfig(r=4, modules_to_save=("norm", "lm_head")),
}


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_training_step(config: str, checkpointing: bool, weight: float) -> None:
    model = on_meta(CONFIGS[config])
    resident = model.residents["a"]
    assert {resident.flat.device, *(leaf.device for leaf in resident.leaves.values())} == {META}
    model.checkpointing = checkpointing
    rows = Rows(torch.arange(24, device=META))
    spans = Spans((Span(0, 20, resident.slot, weight, 5), Span(20, 24, resident.slot, weight, 6)), rows)
    with model.using(Layout.packed(LENGTHS, spans)):
        hidden = model.hidden(IDS, POSITIONS)
        logits = model.logits(hidden[:7], spans.within(0, 7))
        assert {hidden.device, logits.device} == {META}
        logits.float().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.device == META for leaf in resident.leaves.values())
    optimizer = AdamW.of(AdapterWeights.of(resident), settled(TrainOptions(), [])[0], 10)
    optimizer.update()


def test_a_step_of_decoding() -> None:
    model = on_meta(CONFIGS["all linear"])
    slot = model.residents["a"].slot
    store = KeyValueStore()
    store.reserve([0] * 3, [6] * 3, [200] * 3)
    store.write_rows = torch.tensor([start + 5 for start in store.starts], device=META)
    segments = tuple(Segment(i, i + 1, start, start + 6) for i, start in enumerate(store.starts))
    with torch.no_grad(), model.using(Layout(segments, Spans((Span(0, 2, slot),)), store)):
        hidden = model.hidden(IDS[:3], POSITIONS[:3])
        assert model.logits(hidden, model.layout.spans).device == META  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(64, 64), (6, 40)])
def test_products_in_4_bits(shape: tuple[int, int]) -> None:
    size = shape[0] * shape[1]
    codes = torch.zeros(size // 2, 1, dtype=torch.uint8, device=META)
    weight = Nf4Weight(codes, torch.zeros(-(-size // 64), device=META), shape, torch.bfloat16)
    x = torch.zeros(5, shape[1], dtype=torch.bfloat16, device=META).requires_grad_()
    y = matmul(x, weight)
    y.sum().backward()
    assert {y.device, matmul_t(y.detach(), weight).device} == {META}


def test_a_model_moved_after_its_adapters_is_named(lab: Any) -> None:
    model = AdaptedModel(Base(lab.tiny().eval().requires_grad_(False), None, "tiny"))
    spans = Spans((Span(0, 4, model.add("a", LoraConfig()).slot),))
    model.model.to(META)
    with (
        model.using(Layout.packed([4], spans)),
        pytest.raises(AdapterError, match="the model was moved to meta after an adapter was attached"),
    ):
        model.hidden(IDS[:4], POSITIONS[:4])
