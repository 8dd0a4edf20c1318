"""load_base: what opens, how it is held, and one clear sentence for everything that does not open."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from postil.base import Base, base_from_model, device_of, load_base
from postil.errors import BaseModelError

Make = Callable[..., Path]


def refusal(source: str | Path, **options: Any) -> str:
    """The message that load_base refuses `source` with: one line, without a traceback's marks."""
    with pytest.raises(BaseModelError) as caught:
        load_base(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(state)
    save_file(state, path, metadata={"format": "pt"})


# What opens


def test_opens_frozen_in_eval_with_the_stored_bytes(directory: Path) -> None:
    base = load_base(directory)
    assert isinstance(base, Base)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert (base.dtype, base.device, base.context, base.architecture) == (
        torch.float32, torch.device("cpu"), 128, "llama",
    )  # fmt: skip
    assert base.source == str(directory)
    assert base.directory == directory
    stored = load_file(directory / "model.safetensors")
    live = base.model.state_dict()
    assert stored.keys() == live.keys()
    assert all(torch.equal(stored[name], live[name]) for name in stored)
    assert base.tokenizer.is_fast
    assert base.tokenizer.decode(base.tokenizer("né 7").input_ids) == "né 7"


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_owned_aligned_and_tied_as_before(make_directory: Make, tied: bool) -> None:
    base = load_base(make_directory(tie_word_embeddings=tied))
    for name, tensor in [*base.model.named_parameters(), *base.model.named_buffers()]:
        assert tensor.data_ptr() % 64 == 0, name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
    assert (base.model.lm_head.weight is base.model.model.embed_tokens.weight) is tied


def test_weights_do_not_change_with_the_file(directory: Path) -> None:
    base = load_base(directory)
    before = base.model.lm_head.weight.clone()
    path = directory / "model.safetensors"
    with open(path, "r+b") as handle:
        handle.seek(path.stat().st_size // 2)
        handle.write(b"\xff" * (path.stat().st_size // 2))
    assert torch.equal(base.model.lm_head.weight, before)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_keeps_the_stored_dtype_whatever_the_config_says(make_directory: Make, stored: torch.dtype) -> None:
    directory = make_directory(dtype=stored)
    edit_config(directory, dtype="float16" if stored is torch.bfloat16 else "bfloat16")
    base = load_base(directory)
    assert {parameter.dtype for parameter in base.model.parameters()} == {stored}


def test_auto_takes_the_widest_of_mixed_dtypes(directory: Path) -> None:
    def narrow(state: dict[str, torch.Tensor]) -> None:
        state["lm_head.weight"] = state["lm_head.weight"].to(torch.bfloat16)

    edit_weights(directory, narrow)
    assert load_base(directory).dtype is torch.float32


@pytest.mark.parametrize(
    ("vector", "few"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "float16")]
)
def test_auto_does_not_follow_a_few_values_of_another_dtype(make_directory: Make, vector: str, few: str) -> None:
    """A router's biases in float32 had a bfloat16 directory opened at twice its size."""
    directory = make_directory(dtype=getattr(torch, vector))

    def change(state: dict[str, torch.Tensor]) -> None:
        state["model.norm.weight"] = (state["model.norm.weight"] * 1.1).to(getattr(torch, few))

    edit_weights(directory, change)
    assert load_base(directory).dtype is getattr(torch, vector)
    assert load_base(directory, dtype="float32").dtype is torch.float32


def test_auto_holds_two_16_bit_dtypes_in_float32(make_directory: Make) -> None:
    directory = make_directory(dtype=torch.bfloat16)
    edit_weights(directory, lambda state: state.update({"lm_head.weight": state["lm_head.weight"].to(torch.float16)}))
    assert load_base(directory).dtype is torch.float32


def test_dtype_by_name(directory: Path) -> None:
    base = load_base(directory, dtype="bfloat16")
    assert base.dtype is torch.bfloat16
    assert base.fingerprint().form == "bf16"
    assert base.fingerprint().source == load_base(directory).fingerprint().source


def test_sharded_directory_opens_alike(make_directory: Make) -> None:
    whole, sharded = make_directory("whole"), make_directory("sharded", shard="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    ours, theirs = load_base(whole).model.state_dict(), load_base(sharded).model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_old_gpt2_mask_buffers_are_harmless(make_directory: Make) -> None:
    config = GPT2Config(
        vocab_size=259, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    directory = make_directory(model=GPT2LMHeadModel(config))

    def add(state: dict[str, torch.Tensor]) -> None:
        state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
        state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)

    edit_weights(directory, add)
    base = load_base(directory)
    assert (base.architecture, base.context) == ("gpt2", 64)


def test_loading_is_silent_and_restores_the_loggers(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("transformers")
    before = (logger.level, transformers_logging.is_progress_bar_enabled())
    load_base(directory)
    assert capfd.readouterr() == ("", "")
    assert (logger.level, transformers_logging.is_progress_bar_enabled()) == before


def test_a_model_the_user_loaded(directory: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(directory)
    base = base_from_model(model.train())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert base.tokenizer is None
    assert base.directory == directory
    assert base.fingerprint() == load_base(directory).fingerprint()


# Directories that are missing or broken


def test_missing_directory_names_a_near_one(directory: Path) -> None:
    assert "does not exist (did you mean 'model'?)" in refusal(str(directory.parent / "modle"))
    assert "does not exist" in refusal(directory.parent / "modle")


def test_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is empty" in refusal(tmp_path / "empty")


def test_a_file_instead_of_a_directory(directory: Path) -> None:
    assert "is a file, not a model directory" in refusal(directory / "config.json")


def test_no_config(directory: Path) -> None:
    (directory / "config.json").unlink()
    assert "has no config.json" in refusal(directory)


def test_an_adapter_instead_of_a_base(directory: Path) -> None:
    (directory / "config.json").unlink()
    (directory / "adapter_config.json").write_text("{}")
    assert "it is an adapter" in refusal(directory)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"model_type": "lla', "config.json is not valid JSON (line 1"),
        (b"", "config.json is not valid JSON"),
        (b"[1]", "holds a JSON list, not an object"),
        (b'{"a": "\xff"}', "config.json is not UTF-8"),
        (b"{}", "has no model_type"),
    ],
)
def test_config_that_is_no_config(directory: Path, text: bytes, said: str) -> None:
    (directory / "config.json").write_bytes(text)
    assert said in refusal(directory)


def test_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert "has no weights" in refusal(directory)


def test_pickled_weights_are_refused_unread(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04boom")
    message = refusal(directory)
    assert "pytorch_model.bin" in message
    assert "convert to safetensors" in message


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -4096])
def test_truncated_weights_name_the_file(directory: Path, keep: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(directory)
    assert "model.safetensors is truncated or corrupt" in message


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"\xff" * 8 + raw[8:],
        lambda raw: raw[:8] + b"#" + raw[9:],
        lambda raw: raw + b"\0" * 16,
        lambda raw: raw.replace(b'"F32"', b'"F16"', 1),
        lambda raw: raw.replace(b'"shape"', b'"shapo"', 1),
    ],
)
def test_corrupt_header_names_the_file(directory: Path, damage: Callable[[bytes], bytes]) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert "model.safetensors is truncated or corrupt" in refusal(directory)


def test_missing_shard(make_directory: Make) -> None:
    directory = make_directory(shard="20KB")
    gone = sorted(directory.glob("*.safetensors"))[1]
    gone.unlink()
    message = refusal(directory)
    assert "lacks 1 of" in message
    assert gone.name in message


def test_truncated_shard_is_named(make_directory: Make) -> None:
    directory = make_directory(shard="20KB")
    cut = sorted(directory.glob("*.safetensors"))[-1]
    cut.write_bytes(cut.read_bytes()[:-3])
    assert cut.name in refusal(directory)


def test_index_that_points_outside(make_directory: Make) -> None:
    directory = make_directory(shard="20KB")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    assert "'../elsewhere.safetensors'" in refusal(directory)


def test_index_that_names_a_tensor_no_shard_holds(make_directory: Make) -> None:
    directory = make_directory(shard="20KB")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["extra.weight"] = next(iter(index["weight_map"].values()))
    path.write_text(json.dumps(index))
    assert "no weight file holds: extra.weight" in refusal(directory)


def test_missing_tensors_are_listed(directory: Path) -> None:
    gone = "model.layers.1.mlp.up_proj.weight"
    edit_weights(directory, lambda state: state.pop(gone))
    assert f"lacks 1 tensors that its architecture wants: {gone}" in refusal(directory)


def test_a_missing_head_is_missing_unless_tied(make_directory: Make) -> None:
    untied, tied = make_directory("untied"), make_directory("tied", tie_word_embeddings=True)
    edit_weights(untied, lambda state: state.pop("lm_head.weight"))
    assert "lm_head.weight" in refusal(untied)
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    load_base(tied)


def test_unexpected_tensors_are_listed(directory: Path) -> None:
    edit_weights(directory, lambda state: state.update({"model.layers.9.gate.weight": torch.ones(3)}))
    assert "does not use: model.layers.9.gate.weight" in refusal(directory)


def test_wrong_shapes_are_listed(directory: Path) -> None:
    edit_weights(directory, lambda state: state.update({"lm_head.weight": torch.ones(259, 31)}))
    assert "lm_head.weight (stored [259, 31], wanted [259, 32])" in refusal(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(directory: Path, value: float) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.1.self_attn.q_proj.weight"][3, 5] = value

    edit_weights(directory, spoil)
    message = refusal(directory)
    assert "not finite" in message
    assert "model.layers.1.self_attn.q_proj.weight" in message


def test_no_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in refusal(directory)


def test_broken_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").write_text("{")
    assert "tokenizer" in refusal(directory)


# Kinds that postil does not take


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mamba"}, "recurrent (state-space) model (mamba)"),
        ({"model_type": "jamba"}, "recurrent (state-space) model (jamba)"),
        ({"model_type": "recurrent_gemma"}, "recurrent (state-space) model (recurrent_gemma)"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "recurrent (state-space) model (llama)"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder (t5)"),
        ({"model_type": "bert"}, "is an encoder (bert)"),
        ({"model_type": "lama"}, "of the kind 'lama'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by 'gptq'"),
    ],
)
def test_unsupported_kinds_are_refused_by_name(directory: Path, changes: dict[str, Any], said: str) -> None:
    edit_config(directory, **changes)
    assert said in refusal(directory)


def test_every_recurrent_kind_listed_is_known_to_transformers() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from postil.base.support import RECURRENT

    assert set(CONFIG_MAPPING_NAMES) >= RECURRENT


def test_remote_code_is_refused_and_not_run(directory: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (directory / "configuration_evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    assert "configuration_evil.py" in refusal(directory)
    edit_config(directory, auto_map={"AutoConfig": "configuration_evil.Evil"}, model_type="evil")
    message = refusal(directory)
    assert "auto_map in config.json" in message
    assert "trust_remote_code" in message
    assert not mark.exists()


def test_remote_code_of_a_tokenizer_is_refused(directory: Path) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["x.Y", None]}}))
    assert "auto_map in tokenizer_config.json" in refusal(directory)


def test_code_beside_a_model_opens_when_trusted(directory: Path) -> None:
    (directory / "notes.py").write_text("raise SystemExit\n")
    assert load_base(directory, trust_remote_code=True).architecture == "llama"


# Names


def test_a_typo_in_a_known_name() -> None:
    assert "did you mean 'smollm2-135m-instruct'?" in refusal("smollm2-135m-instuct")


def test_a_hub_name_without_a_network() -> None:
    message = refusal("nobody-here/no-such-model")
    assert "the hub cannot be reached" in message


def test_a_hub_name_with_a_dead_network_gives_one_sentence(tmp_path: Path) -> None:
    code = (
        "from postil.base import load_base\nfrom postil.errors import BaseModelError\n"
        "try:\n    load_base('nobody-here/no-such-model')\n"
        "except BaseModelError as error:\n    print(error)\n"
    )
    environment = {
        "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "PATH": ""
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "the hub cannot be reached" in done.stdout, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [("bfloat61", "did you mean 'bfloat16'"), ("int8", "'int8' is no dtype"), ("", "'' is no dtype")],
)
def test_dtype_typos(directory: Path, name: str, said: str) -> None:
    assert said in refusal(directory, dtype=name)


@pytest.mark.parametrize("name", ["cpuu", "gpu", "cuda:", "cuda:x", "cpu:0", "mps"])
def test_device_typos(directory: Path, name: str) -> None:
    assert f"{name!r} is no device" in refusal(directory, device=name)


def test_cuda_that_is_not_there(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "cuda is not available on this machine" in refusal(directory, device="cuda")
    assert device_of("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "cuda:3 does not exist" in refusal(directory, device="cuda:3")
    assert device_of("cuda:0") == torch.device("cuda:0")
