"""Which modules a configuration means in each architecture, what that covers, and every wrong name's message."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from postil.adapter import LoraConfig, attach, find_targets
from postil.adapter.targets import coverage_of, layer_number
from postil.errors import AdapterError

ATTENTION = {
    "llama": "q_proj k_proj v_proj o_proj", "mistral": "q_proj k_proj v_proj o_proj",
    "qwen2": "q_proj k_proj v_proj o_proj", "qwen3": "q_proj k_proj v_proj o_proj",
    "gemma2": "q_proj k_proj v_proj o_proj", "gemma3": "q_proj k_proj v_proj o_proj",
    "phi3": "qkv_proj o_proj", "phi3-longrope": "qkv_proj o_proj", "gpt2": "c_attn c_proj",
    "gpt_neox": "query_key_value dense", "opt": "q_proj k_proj v_proj out_proj",
    "falcon": "query_key_value dense", "bloom": "query_key_value dense",
}  # fmt: skip
FEED_FORWARD = {
    "phi3": "gate_up_proj down_proj", "phi3-longrope": "gate_up_proj down_proj", "gpt2": "c_fc c_proj",
    "gpt_neox": "dense_h_to_4h dense_4h_to_h", "opt": "fc1 fc2",
    "falcon": "dense_h_to_4h dense_4h_to_h", "bloom": "dense_h_to_4h dense_4h_to_h",
}  # fmt: skip


def paths(model: Any, **settings: Any) -> list[str]:
    return [target.path for target in find_targets(model, LoraConfig(**settings))]


def names(model: Any, **settings: Any) -> set[str]:
    return {path.rsplit(".", 1)[-1] for path in paths(model, **settings)}


def test_words_for_groups_of_modules(architecture: str, lab: Any) -> None:
    model = lab.tiny(architecture)
    attention = ATTENTION[architecture].split()
    feed_forward = FEED_FORWARD.get(architecture, "gate_proj up_proj down_proj").split()
    assert names(model) == names(model, target_modules="attention") == set(attention)
    assert names(model, target_modules="feed-forward") == set(feed_forward)
    assert len(paths(model)) == 2 * len(attention)
    both = paths(model, target_modules=("attention", "feed-forward"))
    assert both == paths(model, target_modules="all-linear")
    assert len(both) == len(set(both)) == 2 * (len(attention) + len(feed_forward))


def test_names_suffixes_paths_and_patterns(lab: Any) -> None:
    model = lab.tiny()
    q = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert paths(model, target_modules=("q_proj",)) == q
    assert paths(model, target_modules=("self_attn.q_proj",)) == q
    assert paths(model, target_modules=(q[1],)) == q[1:]
    assert paths(model, target_modules=r".*\.[01]\..*q_proj") == q
    assert paths(model, target_modules=("q_proj", "lm_head", "embed_tokens")) == ["model.embed_tokens", *q, "lm_head"]
    assert paths(model, target_modules=("q_proj",), layers_to_transform=1) == q[1:]
    assert paths(model, target_modules=("q_proj",), layers_to_transform=(0,), layers_pattern="layers") == q[:1]
    assert names(model, exclude_modules=("q_proj", "o_proj")) == {"k_proj", "v_proj"}
    assert names(model, exclude_modules=r".*(q|o)_proj") == {"k_proj", "v_proj"}
    assert names(model, modules_to_save=("q_proj",)) == {"k_proj", "v_proj", "o_proj"}


def test_ranks_scales_and_sizes(lab: Any) -> None:
    config = LoraConfig(
        target_modules=("k_proj", "embed_tokens"), r=4, alpha=8,
        rank_pattern={r"layers\.1\..*": 2}, alpha_pattern={"embed_tokens": 1},
    )  # fmt: skip
    found = find_targets(lab.tiny(), config)
    assert [(t.kind, t.d_in, t.d_out, t.rank, t.scale) for t in found] == [
        ("embedding", 101, 32, 4, 0.25),
        ("linear", 32, 16, 4, 2.0),
        ("linear", 32, 16, 2, 4.0),
    ]
    gpt2 = find_targets(lab.tiny("gpt2"), LoraConfig(target_modules=("c_attn",)))[0]
    assert (gpt2.kind, gpt2.d_in, gpt2.d_out) == ("conv1d", 32, 96)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": ("q_prj",)},
            r"'q_prj' matches no module of this llama model \(did you mean 'q_proj'\?\)",
        ),
        ({"target_modules": ("q_proj", "c_attn")}, "'c_attn' matches no module.*there are: down_proj"),
        (
            {"target_modules": "q_proj"},
            r"'q_proj' alone is a pattern for whole module paths; names stand in a list: \[q_proj\]",
        ),
        (
            {"target_modules": r"layers\.0\.q_proj"},
            "pattern .* matches no whole module path.*paths look like model.layers.0",
        ),
        ({"target_modules": "attenton"}, "did you mean 'attention'"),
        ({"target_modules": ("norm",)}, "model.norm is a LlamaRMSNorm, which has no adapter"),
        ({"exclude_modules": ("up_proj",)}, "exclude_modules: up_proj excludes nothing"),
        ({"exclude_modules": "up_proj"}, "exclude_modules: up_proj excludes nothing"),
        ({"exclude_modules": "model.*"}, "no module is left to adapt"),
        (
            {"modules_to_save": ("lm_haed",)},
            r"modules_to_save: 'lm_haed' matches no module \(did you mean 'lm_head'\?\)",
        ),
        ({"layers_to_transform": 7}, r"no adapted module lies in layer 7; layers found: 0\.\.1"),
        ({"layers_to_transform": 0, "layers_pattern": "h"}, "layers found: none"),
        ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
        ({"rank_pattern": {"up_proj": 4}}, "rank_pattern: 'up_proj' matches none of the adapted modules"),
        ({"alpha_pattern": {"up_proj": 4}}, "alpha_pattern: 'up_proj' matches none of the adapted modules"),
    ],
)
def test_every_wrong_name_is_told(settings: dict[str, Any], message: str, lab: Any) -> None:
    with pytest.raises(AdapterError, match=message):
        find_targets(lab.tiny(), LoraConfig(**settings))


def test_an_embedding_called_with_more_than_ids_is_refused(lab: Any) -> None:
    message = "embed_positions is a OPTLearnedPositionalEmbedding, which has no adapter"
    with pytest.raises(AdapterError, match=message):
        find_targets(lab.tiny("opt"), LoraConfig(target_modules=("embed_positions",)))
    assert paths(lab.tiny("gpt2"), target_modules=("wpe",)) == ["transformer.wpe"]


def test_the_coverage_in_words(lab: Any) -> None:
    model = lab.tiny()
    targets = find_targets(model, LoraConfig(target_modules=("q_proj", "v_proj")))
    coverage = coverage_of(model, targets, 1792)
    total = sum(parameter.numel() for parameter in model.parameters())
    adapted = 2 * (32 * 32 + 32 * 16)
    assert (coverage.modules, coverage.adapted_parameters, coverage.total) == (4, adapted, total)
    first, second = coverage.lines()
    assert first.startswith(f"4 modules adapted (q_proj, v_proj): {adapted:,} of {total:,} base parameters")
    assert f"({adapted / total:.1%})" in first
    assert second.startswith("1,792 trainable parameters")
    assert "0.0 MB" in second


def test_the_number_of_a_layer() -> None:
    assert layer_number("model.layers.3.mlp.experts.5.w1") == 3
    assert layer_number("model.layers.3.mlp.experts.5.w1", "experts") == 5
    assert layer_number("model.layers.3.mlp", ["h", "layers"]) == 3
    assert layer_number("model.layers.3.mlp", "h") is None
    assert layer_number("lm_head") is None


class Linear4bit(nn.Linear):
    """As a quantiser's: a linear layer with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).round()


def replaced(model: Any, path: str, kind: type[nn.Linear]) -> Any:
    parent, _, name = path.rpartition(".")
    new = kind(32, model.get_submodule(path).out_features, bias=False)
    setattr(model.get_submodule(parent), name, new)
    return model


def test_quantised_layers_are_refused_by_name(lab: Any) -> None:
    path = "model.layers.1.self_attn.k_proj"
    model = replaced(lab.tiny(), path, Linear4bit)
    for wanted in (None, "all-linear", "feed-forward"):
        with pytest.raises(AdapterError, match=rf"{path} is a Linear4bit \(torch.float32\).*unquantised"):
            find_targets(model, LoraConfig(target_modules=wanted))
    with pytest.raises(AdapterError, match="k_proj is a Linear4bit, which has no adapter"):
        find_targets(model, LoraConfig(target_modules=("k_proj",)))
    integers = lab.tiny()
    weight = torch.zeros(16, 32, dtype=torch.int8)
    integers.get_submodule(path).weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(AdapterError, match=rf"{path} is a Linear \(torch.int8\)"):
        find_targets(integers, LoraConfig())


def test_a_neighbour_of_another_kind_keeps_its_own_forward(lab: Any) -> None:
    base = replaced(lab.tiny(), "model.layers.0.self_attn.k_proj", Linear4bit)
    attention = base.get_submodule("model.layers.0.self_attn")
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    wanted = attention.k_proj(x)
    model = attach(base, LoraConfig(target_modules=("q_proj",)))
    lab.scramble(model)
    attention.q_proj(x)
    assert torch.equal(attention.k_proj(x), wanted)


def test_a_router_that_is_a_linear_layer_is_none_to_adapt() -> None:
    config = transformers.PhimoeConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=101, num_local_experts=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = transformers.PhimoeForCausalLM(config)
    assert names(model, target_modules="all-linear") == {"q_proj", "k_proj", "v_proj", "o_proj"}
