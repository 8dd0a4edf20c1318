"""LoraConfig: its defaults, its scale, and every impossible value told in one sentence."""

from __future__ import annotations

import math
from typing import Any

import pytest

from postil.adapter import LoraConfig
from postil.errors import AdapterError


def test_the_scale() -> None:
    config = LoraConfig(r=4, alpha=6, rank_pattern={"q_proj": 9, ".*": 2}, alpha_pattern={"mlp.*": 5})
    assert LoraConfig().scale_of("x") == 2.0
    assert (config.rank_of("a.q_proj"), config.rank_of("a.k_proj")) == (9, 2)
    assert config.scale_of("a.q_proj") == 6 / 9
    assert config.scale_of("a.mlp.up") == 5 / 2
    assert config.model_copy(update={"use_rslora": True}).scale_of("a.q_proj") == 6 / math.sqrt(9)


def test_a_pattern_matches_whole_names_at_the_end() -> None:
    config = LoraConfig(r=4, rank_pattern={"q_proj": 1})
    assert [config.rank_of(path) for path in ("q_proj", "a.q_proj", "a.xq_proj", "q_proj.a")] == [1, 1, 4, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rnak": 4}, "LoraConfig: unknown key 'rnak'"),
        ({"alhpa": 4}, r"unknown key 'alhpa' \(did you mean 'alpha'\?\)"),
        ({"r": 0}, r"r: .*greater than or equal to 1.*\(found 0\)"),
        ({"alpha": 0}, "alpha: .*greater than 0"),
        ({"dropout": 1.0}, "dropout: .*less than 1"),
        ({"dropout": -0.1}, "dropout: .*greater than or equal to 0"),
        ({"bias": "some"}, "bias: .*'none', 'all' or 'lora_only'"),
        ({"init": "pissa"}, "init: .*'kaiming' or 'gaussian'"),
        ({"target_modules": ""}, "target_modules: an empty string names no module"),
        ({"target_modules": []}, "target_modules: an empty list names no module; leave the key out"),
        ({"exclude_modules": ""}, "exclude_modules: an empty string names no module"),
        ({"target_modules": "q_proj("}, r"target_modules: 'q_proj\(' is no regular expression"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: '\\(' is no regular expression"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern: the value of pattern 'q' must be above 0"),
        ({"alpha_pattern": {"q": -1}}, "alpha_pattern: the value of pattern 'q' must be above 0"),
    ],
)
def test_impossible_values_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        LoraConfig(**settings)


def test_a_mapping_from_a_file() -> None:
    config = LoraConfig.parse({"r": 2, "target_modules": ["q_proj", "v_proj"], "layers_pattern": []})
    assert (config.r, config.target_modules, config.layers_pattern) == (2, ("q_proj", "v_proj"), None)
    with pytest.raises(AdapterError, match="expected a mapping"):
        LoraConfig.parse([1])
