"""Merged exports: plain transformers gives the running adapted model's logits, as does PEFT's own merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from postil.adapter import AdaptedModel, LoraConfig, attach
from postil.adapter.export import export_merged
from postil.adapter.peft_files import load_adapter, save_adapter

EQUAL = 1e-4
MOVED = 1e-2


def loaded(directory: Path) -> PreTrainedModel:
    """What plain transformers makes of a directory; a key missing or left over fails."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return model.eval()


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def embedding_of(model: PreTrainedModel) -> str:
    """The path of the token embedding."""
    return next(path for path, module in model.named_modules() if module is model.get_input_embeddings())


def running(lab: Any, base: PreTrainedModel, config: LoraConfig) -> AdaptedModel:
    """An adapter on a base, at work and clearly so."""
    bare = lab.plain(base)
    model = attach(base, config)
    lab.scramble(model)
    assert (lab.plain(model.model) - bare).abs().max() > MOVED
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_export_is_the_adapted_model(architecture: str, tied: bool, lab: Any, tmp_path: Path) -> None:
    base = lab.tiny(architecture, tie_word_embeddings=tied)
    assert is_tied(base) == tied
    model = running(lab, base, LoraConfig(target_modules="all-linear"))
    plain = loaded(export_merged(model, "default", tmp_path / "whole").path)
    assert is_tied(plain) == tied
    found = lab.plain(plain)
    lab.near(found, lab.plain(model.model), EQUAL)
    lab.near(found, lab.packed(model), EQUAL)
    save_adapter(model.export("default"), tmp_path / "adapter")
    fresh = lab.tiny(architecture, tie_word_embeddings=tied)
    theirs = lab.peft_load(fresh, tmp_path / "adapter").merge_and_unload()
    lab.near(found, lab.plain(theirs), EQUAL)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_adapted_embedding_and_head_are_exported(architecture: str, tied: bool, lab: Any, tmp_path: Path) -> None:
    """Where they were one tensor the export holds two, and its configuration says so."""
    base = lab.tiny(architecture, tie_word_embeddings=tied)
    targets = (embedding_of(base), "lm_head", "attention")
    model = running(lab, base, LoraConfig(target_modules=targets, rank_pattern={"lm_head": 3}))
    plain = loaded(export_merged(model, "default", tmp_path / "whole").path)
    assert not is_tied(plain)
    assert not plain.config.tie_word_embeddings
    assert is_tied(base) == base.config.tie_word_embeddings == tied
    found = lab.plain(plain)
    lab.near(found, lab.plain(model.model), EQUAL)
    lab.near(found, lab.packed(model), EQUAL)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", LoraConfig(modules_to_save=("lm_head", "norm"), use_rslora=True)),
        ("gemma2", LoraConfig(modules_to_save=("lm_head", "post_attention_layernorm"))),
        ("qwen3", LoraConfig(modules_to_save=("embed_tokens", "q_norm"))),
        ("qwen2", LoraConfig(bias="lora_only", alpha_pattern={"k_proj": 3})),
        ("gpt2", LoraConfig(bias="all", target_modules=("wpe", "c_attn"))),
        ("opt", LoraConfig(bias="all", modules_to_save=("final_layer_norm",))),
        ("bloom", LoraConfig(bias="lora_only", layers_to_transform=(1,))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_linear_term_is_exported(name: str, config: LoraConfig, lab: Any, tmp_path: Path) -> None:
    model = running(lab, lab.tiny(name), config)
    found = lab.plain(loaded(export_merged(model, "default", tmp_path / "whole").path))
    lab.near(found, lab.plain(model.model), EQUAL)
    lab.near(found, lab.packed(model), EQUAL)


def test_an_adapter_of_pefts_is_exported(architecture: str, lab: Any, tmp_path: Path) -> None:
    """PEFT's files and a bare base in, a plain model out: no model with adapters ever at hand."""
    theirs = lab.peft_model(lab.tiny(architecture), LoraConfig(target_modules="all-linear", use_rslora=True))
    theirs.save_pretrained(str(tmp_path / "adapter"))
    export_merged(lab.tiny(architecture), load_adapter(tmp_path / "adapter"), tmp_path / "whole")
    lab.near(lab.plain(loaded(tmp_path / "whole")), lab.plain(theirs), EQUAL)
