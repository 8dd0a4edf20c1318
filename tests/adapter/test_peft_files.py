"""Adapter directories: exchanged with the real PEFT in both directions, and every way to be broken."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from postil.adapter import peft_config, peft_files
from postil.adapter.adapter import Adapter
from postil.adapter.config import LoraConfig
from postil.adapter.peft_config import peft_targets
from postil.adapter.peft_files import CONFIG, OWN, WEIGHTS, load_adapter, save_adapter
from postil.errors import AdapterError, StorageError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*base_model_name_or_path. was renamed:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to:UserWarning"),
]

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 3, "q_proj": 1}, "alpha_pattern": {"v_proj": 5}},
    "rslora": {"use_rslora": True},
    "saved": {"modules_to_save": ["lm_head"]},
    "saved endings": {"modules_to_save": ["norm"]},
    "regex": {"target_modules": r".*\.(up|down)_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "bias lora_only": {"bias": "lora_only"},
    "bias all": {"bias": "all"},
    "bias all, saved": {"bias": "all", "modules_to_save": ["o_proj"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
}


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, vocab_size=32, attention_bias=True, max_position_embeddings=32,
        )
    )  # fmt: skip


def peft_model(**fields: Any) -> Any:
    values = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | fields
    model = peft.get_peft_model(tiny(), peft.LoraConfig(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    return model


def reload(directory: Path) -> tuple[Any, Any]:
    """PEFT's own reading of a directory: the model and what loading reported."""
    config = peft.LoraConfig.from_pretrained(str(directory))
    model = peft.get_peft_model(tiny(), config)
    return model, model.load_adapter(str(directory), "default")


def example(**fields: Any) -> Adapter:
    tensors = {}
    for name in ("q_proj", "v_proj"):
        tensors[f"model.layers.0.self_attn.{name}.lora_A.weight"] = torch.randn(2, 16)
        tensors[f"model.layers.0.self_attn.{name}.lora_B.weight"] = torch.randn(16, 2)
    values = {"r": 2, "alpha": 4, "target_modules": ("q_proj", "v_proj"), "layers_to_transform": 0} | fields
    return Adapter(
        LoraConfig(**values), tensors, {"source": "sha256:ab", "form": "fp32"}, "tiny", {"template_hash": "x"}
    )


def test_every_field_of_peft_is_classified_once() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    groups = [peft_config.SUPPORTED, peft_config.REFUSED, peft_config.HARMLESS]
    assert set().union(*groups) == fields
    assert sum(map(len, groups)) == len(fields)
    assert peft.__version__ == peft_config.PEFT_VERSION


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_peft_to_postil_and_back(fields: dict[str, Any], tmp_path: Path) -> None:
    model = peft_model(**fields)
    model.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / WEIGHTS)
    assert not any(part in key for key in adapter.tensors for part in ("base_model", "base_layer", "modules_to_save"))
    assert set(adapter.modules) <= {path for path, _ in tiny().named_modules()}
    plain = {key.removeprefix("base_model.model.").replace(".base_layer.", "."): v for key, v in theirs.items()}
    for key, value in adapter.tensors.items():
        if key in plain:
            assert torch.equal(value, plain[key])
    layers = {path.removeprefix("base_model.model."): m for path, m in model.named_modules() if hasattr(m, "lora_A")}
    for path in adapter.modules:
        assert adapter.config.scale_of(path) == pytest.approx(layers[path].scaling["default"])
        assert adapter.config.rank_of(path) == layers[path].r["default"]

    save_adapter(adapter, tmp_path / "ours")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "ours"))
    assert not [str(w.message) for w in caught if "is_gradient_checkpointing" not in str(w.message)]
    here, there = get_peft_model_state_dict(loaded), get_peft_model_state_dict(model)
    assert here.keys() == there.keys()
    ids = torch.arange(8)[None]
    assert all(torch.equal(here[key], there[key]) for key in here if "original_module" not in key)
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
    again, report = reload(tmp_path / "ours")
    assert report.unexpected_keys == []
    assert again.peft_config["default"].r == 2
    back = load_adapter(tmp_path / "ours")
    assert back.config == adapter.config
    assert back.tensors.keys() == adapter.tensors.keys()


def test_adapter_round_trip_with_words_and_card(tmp_path: Path) -> None:
    adapter = example(target_modules="attention", alpha=4.5)
    save_adapter(adapter, tmp_path / "a")
    back = load_adapter(tmp_path / "a")
    assert (back.config, back.base, back.base_name, back.card) == (
        adapter.config, adapter.base, adapter.base_name, adapter.card,
    )  # fmt: skip
    assert all(torch.equal(back.tensors[key], value) for key, value in adapter.tensors.items())
    written = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert written["target_modules"] == sorted(adapter.modules)
    assert written["lora_alpha"] == 4.5
    _, report = reload(tmp_path / "a")
    assert report.unexpected_keys == []
    card = (tmp_path / "a" / "README.md").read_text()
    assert card.startswith('---\nbase_model: "tiny"\nlibrary_name: peft\n')


def test_equal_adapters_give_equal_bytes_and_readable_files(tmp_path: Path) -> None:
    adapter = example()
    for name in "ab":
        save_adapter(adapter, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(["README.md", CONFIG, WEIGHTS, OWN])
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).stat().st_mode & 0o777 == (tmp_path / "a" / CONFIG).stat().st_mode & 0o777


def test_dtype_is_kept_and_shared_memory_is_saved(tmp_path: Path) -> None:
    adapter = example()
    both = torch.randn(4, 16, dtype=torch.bfloat16)
    for index, name in enumerate(("q_proj", "v_proj")):
        adapter.tensors[f"model.layers.0.self_attn.{name}.lora_A.weight"] = both[2 * index : 2 * index + 2]
    back = load_adapter(save_adapter(adapter, tmp_path / "a"))
    value = back.tensors["model.layers.0.self_attn.v_proj.lora_A.weight"]
    assert value.dtype == torch.bfloat16
    assert torch.equal(value, both[2:])


def test_targets_written_for_peft() -> None:
    assert peft_targets(example()) == ["q_proj", "v_proj"]
    assert peft_targets(example(target_modules=".*q_proj", layers_to_transform=None)) == ".*q_proj"
    assert peft_targets(example(target_modules=("attention", "q_proj"))) == sorted(example().modules)


def test_patterns_keep_their_order(tmp_path: Path) -> None:
    patterns = {"v_proj": 7.0, "[qv]_proj": 3.0}
    back = load_adapter(save_adapter(example(alpha_pattern=patterns), tmp_path / "a"))
    assert list(back.config.alpha_pattern) == list(patterns)
    assert list(json.loads((tmp_path / "a" / CONFIG).read_text())["alpha_pattern"]) == list(patterns)


def test_not_finite_is_not_saved(tmp_path: Path) -> None:
    adapter = example()
    adapter.tensors[key := "model.layers.0.self_attn.q_proj.lora_B.weight"][0, 0] = float("nan")
    with pytest.raises(AdapterError, match=key):
        save_adapter(adapter, tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["fsync", "safetensors"])
def test_full_disk_leaves_the_old_adapter(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = example()
    save_adapter(old, tmp_path / "a")

    def full(*_: object, **__: object) -> None:
        if how == "fsync":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise peft_files.SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        if how == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr(peft_files, "save_file", full)
        with pytest.raises(StorageError, match="No space left"):
            save_adapter(example(), tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    back = load_adapter(tmp_path / "a")
    assert all(torch.equal(back.tensors[key], value) for key, value in old.tensors.items())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = save_adapter(example(), tmp_path / "a")
    (path / OWN).unlink()
    return path


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_broken_directories(saved: Path) -> None:
    with pytest.raises(AdapterError, match="does not exist"):
        load_adapter(saved / "none")
    with pytest.raises(AdapterError, match="is a file"):
        load_adapter(saved / CONFIG)
    (saved.parent / "empty").mkdir()
    with pytest.raises(AdapterError, match=f"no {CONFIG}; it holds nothing"):
        load_adapter(saved.parent / "empty")
    with pytest.raises(AdapterError, match=r"there is one in .*a"):
        load_adapter(saved.parent)
    weights = (saved / WEIGHTS).read_bytes()
    for broken in (b"", weights[:20], weights[:-8], b"\xff" * 64):
        (saved / WEIGHTS).write_bytes(broken)
        with pytest.raises(AdapterError, match=f"{WEIGHTS} is truncated or corrupt"):
            load_adapter(saved)
    (saved / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=f"no {WEIGHTS}"):
        load_adapter(saved)
    (saved / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(AdapterError, match="postil convert "):
        load_adapter(saved)
    for text in ("{", "[]", ""):
        (saved / CONFIG).write_text(text)
        with pytest.raises(AdapterError, match=CONFIG):
            load_adapter(saved)


@pytest.mark.parametrize("field", sorted(peft_config.REFUSED))
def test_unsupported_fields_are_refused_by_name(field: str, saved: Path) -> None:
    edit(saved / CONFIG, **{field: {"x": 1}})
    with pytest.raises(AdapterError, match=field):
        load_adapter(saved)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type"),
        ({"brand_new": 0.5}, "unknown field brand_new"),
        ({"brand_new": 0}, "unknown field brand_new"),
        ({"r": "many"}, "r: "),
        ({"r": 3}, "rank 3"),
        ({"bias": "some"}, "bias"),
        *(({"init_lora_weights": name}, name) for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "x")),
    ],
)  # fmt: skip
def test_other_bad_fields(fields: dict[str, Any], message: str, saved: Path) -> None:
    edit(saved / CONFIG, **fields)
    with pytest.raises(AdapterError, match=message):
        load_adapter(saved)


def test_empty_unknown_fields_and_eva_and_old_files_load(saved: Path) -> None:
    edit(saved / CONFIG, brand_new=None, other={}, init_lora_weights="gaussian")
    assert load_adapter(saved).config.init == "gaussian"
    edit(saved / CONFIG, target_modules=None, init_lora_weights="eva")
    adapter = load_adapter(saved)
    assert adapter.config.target_modules == tuple(sorted(adapter.modules))
    assert adapter.base == {}


def test_strange_missing_and_twofold_keys(saved: Path) -> None:
    good = load_file(saved / WEIGHTS)
    first = next(key for key in good if "lora_A" in key)

    def attempt(tensors: dict[str, torch.Tensor], message: str) -> None:
        save_file(tensors, saved / WEIGHTS)
        with pytest.raises(AdapterError, match=message):
            load_adapter(saved)

    one = torch.ones(1)
    for strange in ("foo", first.replace("lora_A.weight", "lora_magnitude_vector"), "base_model.model.x.norm.weight",
                    first.replace("lora_A.weight", "base_layer.bias")):  # fmt: skip
        attempt(good | {strange: one}, strange)
    attempt({key: value for key, value in good.items() if key != first}, "lora_A.weight is missing")
    attempt(good | {first.replace("lora_A.", "lora_A.default."): good[first] + 1}, "two tensors mean")
    attempt({}, "no lora_A")
    attempt(good | {first: good[first] * float("inf")}, "NaN or infinite")
    attempt(good | {first: good[first].int()}, "not floating point")


def test_adapter_names_inside_keys_are_understood(saved: Path) -> None:
    good = load_file(saved / WEIGHTS)
    expected = load_adapter(saved).tensors
    named = {key.replace(".weight", ".mine.weight"): value for key, value in good.items()}
    save_file(named, saved / WEIGHTS)
    assert load_adapter(saved).tensors.keys() == expected.keys()


def test_own_file_is_checked(tmp_path: Path) -> None:
    path = save_adapter(example(), tmp_path / "a")
    edit(path / CONFIG, lora_alpha=64)
    with pytest.raises(AdapterError, match=r"alpha = 4\.0 but"):
        load_adapter(path)
    edit(path / CONFIG, lora_alpha=4)
    edit(path / OWN, format=2)
    with pytest.raises(AdapterError, match="format 2"):
        load_adapter(path)
    edit(path / OWN, format=1, config={"rr": 1})
    with pytest.raises(AdapterError, match="rr"):
        load_adapter(path)
    edit(path / OWN, config=3)
    with pytest.raises(AdapterError, match="'config'"):
        load_adapter(path)
