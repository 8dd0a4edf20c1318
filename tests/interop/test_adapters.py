"""Adapters exchanged with PEFT: the same files give the same float32 logits in either library, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from postil.adapter import LoraConfig, attach, detach
from postil.adapter.peft_files import load_adapter, save_adapter
from postil.base import live_digest

EQUAL = 1e-5  # float32 logits of size 1
MOVED = 1e-2  # an adapter that changes less than this would prove nothing
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "rank and alpha patterns": ("llama", {
        "r": 4, "alpha": 6, "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj"),
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 7, "k_proj": 1},
        "alpha_pattern": {r"layers\.0\.(self_attn|mlp)\.\w+": 9, "v_proj": 3.5}}),
    "patterns of fused layers, rsLoRA": ("phi3", {
        "use_rslora": True, "target_modules": ("qkv_proj", "gate_up_proj", "down_proj"),
        "rank_pattern": {"gate_up_proj": 3, r"0\.mlp\.down_proj": 5}, "alpha_pattern": {"qkv_proj": 2}}),
    "patterns of a Conv1D": ("gpt2", {
        "target_modules": ("c_attn", "c_proj", "c_fc"), "rank_pattern": {r"attn\.c_proj": 2},
        "alpha_pattern": {r"h\.1\.mlp\.c_proj": 30}}),
    "rsLoRA": ("falcon", {"use_rslora": True, "r": 5, "target_modules": ("query_key_value", "dense_4h_to_h")}),
    "regex": ("mistral", {"target_modules": r".*layers\.\d+\.(self_attn\.[qo]|mlp\.down)_proj"}),
    "regex of one layer": ("gemma3", {"target_modules": r"model\.layers\.1\..*_proj", "use_rslora": True}),
    "layers": ("bloom", {"target_modules": ("query_key_value", "dense"), "layers_to_transform": (1,),
                         "layers_pattern": "h"}),
    "excluded": ("qwen3", {"target_modules": "all-linear", "exclude_modules": ("k_proj", "layers.0.mlp.up_proj")}),
    "biases of the adapted": ("qwen2", {"bias": "lora_only", "target_modules": ("q_proj", "k_proj", "o_proj")}),
    "biases of an adapted Conv1D": ("gpt2", {"bias": "lora_only", "target_modules": ("c_attn", "c_fc")}),
    "biases of the adapted, fused": ("falcon", {"bias": "lora_only", "target_modules": ("query_key_value",)}),
    "all biases": ("opt", {"bias": "all", "target_modules": ("q_proj", "v_proj", "fc1")}),
    "all biases, rotary": ("gpt_neox", {"bias": "all", "target_modules": ("query_key_value", "dense")}),
    "all biases, alibi": ("bloom", {"bias": "all", "target_modules": ("dense_h_to_4h",)}),
    "all biases, head saved": ("gpt2", {
        "bias": "all", "modules_to_save": ("lm_head", "ln_1"), "target_modules": ("c_attn",)}),
    "head and norm saved": ("llama", {"modules_to_save": ("lm_head", "norm"), "target_modules": ("q_proj",)}),
    "head and its norms saved": ("qwen3", {
        "modules_to_save": ("lm_head", "model.norm", "q_norm"), "target_modules": ("v_proj", "down_proj")}),
    "tied head saved": ("gemma2", {
        "modules_to_save": ("lm_head", "pre_feedforward_layernorm"), "target_modules": ("q_proj", "o_proj")}),
    "norms of each head saved": ("gemma3", {
        "modules_to_save": ("norm", "q_norm", "k_norm"), "target_modules": ("q_proj",)}),
    "an untied head and the last norm saved": ("gpt_neox", {
        "modules_to_save": ("lm_head", "final_layer_norm"), "target_modules": ("query_key_value",)}),
    "an adapted module saved": ("mistral", {
        "modules_to_save": ("layers.0.self_attn.o_proj",), "target_modules": ("q_proj", "o_proj")}),
    "embedding saved": ("qwen2", {"modules_to_save": ("embed_tokens",), "target_modules": ("v_proj",)}),
    "head adapted": ("llama", {"target_modules": ("lm_head", "q_proj"), "rank_pattern": {"lm_head": 3}}),
    "embedding": ("llama", {"target_modules": ("embed_tokens", "k_proj"), "rank_pattern": {"embed_tokens": 3}}),
    "scaled embedding, tied": ("gemma2", {"target_modules": ("embed_tokens", "q_proj")}),
    "scaled embedding, untied": ("gemma3", {"target_modules": ("embed_tokens",), "use_rslora": True}),
    "embedding before a norm": ("bloom", {"target_modules": ("word_embeddings", "query_key_value")}),
    "embeddings of tokens and places": ("gpt2", {"target_modules": ("wte", "wpe", "c_attn")}),
    "embedding, another name": ("gpt_neox", {"target_modules": ("embed_in", "dense_4h_to_h")}),
    "embedding, falcon": ("falcon", {"target_modules": ("word_embeddings", "dense")}),
}  # fmt: skip
UNTIED = ("scaled embedding, untied",)


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[str, LoraConfig, dict[str, Any]]:
    """Architecture, configuration, and what is changed in the architecture's own."""
    name, fields = CASES[request.param]
    return name, LoraConfig(**fields), {"tie_word_embeddings": False} if request.param in UNTIED else {}


def to_peft(lab: Any, name: str, config: LoraConfig, changes: dict[str, Any], place: Path) -> None:
    """attach, save_adapter, PeftModel.from_pretrained: equal logits, from plain calls and from a pack."""
    base = lab.tiny(name, **changes)
    before, bare = live_digest(base), lab.plain(base)
    model = attach(base, config)
    lab.scramble(model)
    wanted = lab.plain(model.model)
    assert (wanted - bare).abs().max() > MOVED
    save_adapter(model.export("default"), place)
    theirs = lab.peft_load(lab.tiny(name, **changes), place)
    found = lab.plain(theirs)
    lab.near(found, wanted, EQUAL)
    lab.near(found, lab.packed(model), EQUAL)
    detach(model)
    assert live_digest(base) == before


def from_peft(lab: Any, name: str, config: LoraConfig, changes: dict[str, Any], place: Path) -> None:
    """get_peft_model, save_pretrained, load_adapter, attach: equal logits, from plain calls and from a pack."""
    theirs = lab.peft_model(lab.tiny(name, **changes), config)
    wanted = lab.plain(theirs)
    theirs.save_pretrained(str(place))
    base = lab.tiny(name, **changes)
    before, bare = live_digest(base), lab.plain(base)
    assert (wanted - bare).abs().max() > MOVED
    model = attach(base, load_adapter(place))
    lab.near(lab.plain(model.model), wanted, EQUAL)
    lab.near(lab.packed(model), wanted, EQUAL)
    detach(model)
    assert live_digest(base) == before


def test_every_linear_layer_to_peft(architecture: str, lab: Any, tmp_path: Path) -> None:
    to_peft(lab, architecture, LoraConfig(target_modules="all-linear"), {}, tmp_path / "a")


def test_every_linear_layer_from_peft(architecture: str, lab: Any, tmp_path: Path) -> None:
    from_peft(lab, architecture, LoraConfig(target_modules="all-linear"), {}, tmp_path / "a")


def test_the_default_targets_to_peft(architecture: str, lab: Any, tmp_path: Path) -> None:
    to_peft(lab, architecture, LoraConfig(), {}, tmp_path / "a")


def test_each_feature_to_peft(case: tuple[str, LoraConfig, dict[str, Any]], lab: Any, tmp_path: Path) -> None:
    to_peft(lab, *case, tmp_path / "a")


def test_each_feature_from_peft(case: tuple[str, LoraConfig, dict[str, Any]], lab: Any, tmp_path: Path) -> None:
    from_peft(lab, *case, tmp_path / "a")


def test_the_first_pattern_wins_in_peft_too(lab: Any, tmp_path: Path) -> None:
    """In the file's order; PEFT's own save sorts the patterns, so that there the last letter may come to win."""
    patterns = {"v_proj": 3.5, r"layers\.0\.self_attn\.\w+": 9.0}
    to_peft(lab, "llama", LoraConfig(alpha_pattern=patterns), {}, tmp_path / "a")


def test_the_wrong_scale_would_be_seen(lab: Any, tmp_path: Path) -> None:
    """The comparison can fail: the same tensors under another alpha are far from equal."""
    model = attach(lab.tiny("llama"), LoraConfig(alpha=16))
    lab.scramble(model)
    adapter = model.export("default")
    adapter.config = LoraConfig(alpha=15)
    save_adapter(adapter, tmp_path / "a")
    found = lab.plain(lab.peft_load(lab.tiny("llama"), tmp_path / "a"))
    with pytest.raises(AssertionError, match="is more than"):
        lab.near(found, lab.plain(model.model), 100 * EQUAL)


def test_a_norm_called_norm_stays_one_module_there(lab: Any, tmp_path: Path) -> None:
    """PEFT takes modules_to_save as endings without a dot, so "norm" alone would mean every norm of the model."""
    model = attach(lab.tiny("llama"), LoraConfig(modules_to_save=("norm",)))
    save_adapter(model.export("default"), tmp_path / "a")
    theirs = lab.peft_load(lab.tiny("llama"), tmp_path / "a")
    saved = [path for path, module in theirs.named_modules() if hasattr(module, "modules_to_save")]
    assert [path.removeprefix("base_model.model.") for path in saved if path] == ["model.norm"]


def test_both_libraries_start_alike(lab: Any) -> None:
    """Fresh adapters change nothing in either library, and their A have the same spread."""
    for name in ("llama", "gpt2"):
        model = attach(lab.tiny(name), LoraConfig(r=64, target_modules="all-linear"))
        assert torch.equal(lab.plain(model.model), lab.plain(lab.tiny(name)))
        theirs = lab.peft_model(lab.tiny(name), LoraConfig(r=64, target_modules="all-linear"), size=0.0)
        state = lab.peft.get_peft_model_state_dict(theirs)
        ours = model.export("default").tensors
        assert {key.removeprefix("base_model.model.") for key in state} == ours.keys()
        for key, value in state.items():
            mine = ours[key.removeprefix("base_model.model.")]
            assert mine.shape == value.shape
            assert float(mine.std()) == pytest.approx(float(value.std()), rel=0.1)
            assert float(mine.abs().max()) == pytest.approx(float(value.abs().max()), rel=0.05)
