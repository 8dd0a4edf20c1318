"""Directories of 4-bit weights: what `postil quantize` writes and bitsandbytes reads, and the other way round."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from postil.base import base_from_model, live_digest, load_base, nf4_layers, show
from postil.base.nf4_directory import quantise_directory, settings
from postil.base.stored import nf4_weights, plain_tensors, stored_tensors
from postil.errors import BaseModelError, StorageError

Make = Callable[..., Path]
IDS = torch.arange(3, 20)[None]
MARK = ".quant_state.bitsandbytes__nf4"


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """No bars and lines of transformers in the tests' output."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(level)


def bits(**changes: Any) -> transformers.BitsAndBytesConfig:
    """transformers' configuration of bitsandbytes' NF4."""
    options: dict[str, Any] = {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    }  # fmt: skip
    return transformers.BitsAndBytesConfig(**options | changes)


def by_bitsandbytes(directory: Path, out: Path, **changes: Any) -> Path:
    """A directory that transformers and bitsandbytes quantise and save on the CPU."""
    pytest.importorskip("bitsandbytes")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=bits(**changes), device_map={"": "cpu"}
    )
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(directory).save_pretrained(out)
    return out


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = directory / "model.safetensors"
    state = {key: tensor.clone() for key, tensor in load_file(path).items()}
    change(state)
    save_file(state, path, metadata={"format": "pt"})


# Written by postil


@pytest.fixture
def written(directory: Path, tmp_path: Path) -> Path:
    size = quantise_directory(directory, tmp_path / "nf4")
    assert size.layers == 14
    return tmp_path / "nf4"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_written_base_opens_to_the_same_bits(make_directory: Make, tied: bool, dtype: torch.dtype) -> None:
    directory = make_directory(tie_word_embeddings=tied, dtype=dtype)
    out = directory.with_name("nf4")
    quantise_directory(directory, out)
    while_loading = load_base(directory, quant="nf4")
    for base in (load_base(out), load_base(str(out), quant="nf4")):
        assert base.quantised
        assert base.dtype is dtype
        assert live_digest(base.model) == live_digest(while_loading.model)
        assert base.fingerprint() == while_loading.fingerprint()
        assert (base.model.lm_head.weight is base.model.model.embed_tokens.weight) is tied
        assert base.tokenizer("né").input_ids == while_loading.tokenizer("né").input_ids
        assert all(layer.nf4.dtype is dtype for _, layer in nf4_layers(base.model))
        for name, tensor in [*base.model.named_parameters(), *base.model.named_buffers()]:
            assert tensor.data_ptr() % 64 == 0, name
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_the_files_hold_what_transformers_writes(directory: Path, written: Path) -> None:
    config = json.loads((written / "config.json").read_text())
    wanted = json.loads(bits(llm_int8_skip_modules=["lm_head"]).to_json_string(use_diff=False))
    assert config["quantization_config"] == wanted
    tensors = stored_tensors(written)
    assert len(nf4_weights(tensors)) == 14
    dense = load_file(directory / "model.safetensors")
    left = {tensor.name for tensor in plain_tensors(tensors)}
    assert left == {name for name in dense if "_proj" not in name}
    assert {path.stat().st_mode & 0o777 for path in written.iterdir()} == {
        (written / "config.json").stat().st_mode & 0o777
    }
    assert (written / "tokenizer.json").is_file()
    assert (
        written.joinpath("model.safetensors").stat().st_size < directory.joinpath("model.safetensors").stat().st_size
    )


# Rows of whole blocks: where one straddles rows, bitsandbytes 0.50's AVX-512 path dequantises wrongly.
KINDS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=259, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        vocab_size=259, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_local_experts=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_bitsandbytes_loads_what_is_written_and_gives_the_same_logits(make_directory: Make, kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    directory = make_directory(model=transformers.AutoModelForCausalLM.from_config(KINDS[kind]()))
    out = directory.with_name("nf4")
    quantise_directory(directory, out)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, device_map={"": "cpu"}, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base = load_base(out)
    linear = {path for path, module in theirs.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert linear == {path for path, _ in nf4_layers(base.model)}
    theirs.train()  # in eval mode on AVX-512 bitsandbytes repacks its weights and rounds their scales to bfloat16
    wanted, found = theirs(IDS, use_cache=False).logits, base.model(IDS, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert not torch.allclose(found, load_base(directory).model(IDS, use_cache=False).logits, atol=1e-3)


def test_the_source_is_the_dense_bases_until_a_byte_changes(directory: Path, written: Path) -> None:
    assert load_base(written).fingerprint().source == load_base(directory).fingerprint().source
    assert show(written)["fingerprint"] == load_base(directory).fingerprint().source

    def flip(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.0.mlp.up_proj.weight"].view(-1)[0] ^= 1

    edit(written, flip)
    with pytest.raises(
        BaseModelError, match=r"other weights or settings than `postil quantize` wrote \(postil.json\)"
    ):
        load_base(written).fingerprint()
    (written / "postil.json").unlink()  # then it is a base of its own
    assert load_base(written).fingerprint().source != load_base(directory).fingerprint().source


def test_nothing_is_written_over_or_half(directory: Path, written: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing was written, name a new directory"):
        quantise_directory(directory, written)
    with pytest.raises(BaseModelError, match="holds 4-bit weights already: there is nothing to quantise"):
        quantise_directory(written, tmp_path / "again")
    edit(directory, lambda state: state["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
    with pytest.raises(BaseModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        quantise_directory(directory, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert not list(tmp_path.glob(".postil*"))


def test_settings_name_the_layers_left_dense(make_directory: Make) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=259, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_experts=4,
        num_attention_heads=4, num_key_value_heads=2, moe_intermediate_size=32, shared_expert_intermediate_size=64,
    )  # fmt: skip
    base = load_base(make_directory(model=transformers.AutoModelForCausalLM.from_config(config)), quant="nf4")
    named = settings(base.model, base.dtype)["llm_int8_skip_modules"]
    assert named == [*(f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1)), "lm_head"]


# Written by bitsandbytes


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_of_bitsandbytes_opens_bit_for_bit(
    make_directory: Make, double: bool, dtype: torch.dtype
) -> None:
    directory = make_directory(dtype=dtype)
    theirs = by_bitsandbytes(directory, directory.with_name("bnb"), bnb_4bit_use_double_quant=double)
    base = load_base(theirs)
    assert base.fingerprint().form == "nf4"
    assert base.fingerprint().source != load_base(directory).fingerprint().source  # nothing there says whose it was
    assert base.dtype is dtype
    stored = load_file(theirs / "model.safetensors")
    for path, layer in nf4_layers(base.model):
        found, name = layer.nf4, f"{path}.weight"
        assert torch.equal(found.packed, stored[name])
        assert torch.equal(found.absmax, stored[f"{name}.absmax"])
        assert found.nested is double
        assert found.dtype is dtype
        if double:
            assert torch.equal(found.tensors()["nested_absmax"], stored[f"{name}.nested_absmax"])
    if double:
        assert live_digest(base.model) == live_digest(load_base(directory, quant="nf4").model)


def test_a_wider_dtype_is_that_of_all_else(make_directory: Make) -> None:
    directory = make_directory(dtype=torch.bfloat16)
    out = directory.with_name("nf4")
    quantise_directory(directory, out)
    base = load_base(out, dtype="float32")
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}
    assert {layer.nf4.dtype for _, layer in nf4_layers(base.model)} == {torch.bfloat16}
    assert base.model(IDS).logits.dtype is torch.float32


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("absmax", r"up_proj\.weight"),
        ("state", "stores"),
        ("packed", r"up_proj\.weight"),
        ("stray", r"stores a 4-bit weight model\.layers\.9\.mlp\.up_proj\.weight"),
        ("norm", r"lacks 1 tensors .*model\.norm\.weight"),
    ],
)
def test_a_broken_checkpoint_is_refused_by_key(written: Path, fault: str, said: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def change(state: dict[str, torch.Tensor]) -> None:
        if fault == "absmax":
            del state[f"{name}.absmax"]
        if fault == "state":
            del state[f"{name}{MARK}"]
        if fault == "packed":
            state[name] = state[name][:-1].clone()
        if fault == "stray":
            for key in [key for key in state if key.startswith(name)]:
                state[key.replace("layers.1", "layers.9")] = state[key].clone()
        if fault == "norm":
            del state["model.norm.weight"]

    edit(written, change)
    with pytest.raises(BaseModelError, match=said):
        load_base(written)


def test_a_config_without_its_weights_is_refused(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": bits().to_dict()}))
    with pytest.raises(BaseModelError, match="stores no 4-bit weight, though its config"):
        load_base(directory)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes fp4"),
        ({"load_in_4bit": True}, "bitsandbytes fp4"),  # what it means where nothing is said
        ({"load_in_8bit": True}, "bitsandbytes 8-bit"),
        ({"quant_method": "awq"}, "awq"),
        ({"bits": 4}, "unknown"),
    ],
)
def test_other_quantisations_are_refused_by_name(written: Path, changes: dict[str, Any], named: str) -> None:
    path = written / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": changes}))
    with pytest.raises(BaseModelError, match=f"weights quantised by '{named}', which postil cannot adapt"):
        load_base(written)


def test_a_live_model_of_bitsandbytes_is_refused(written: Path) -> None:
    pytest.importorskip("bitsandbytes")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(written, device_map={"": "cpu"})
    with pytest.raises(BaseModelError, match="quantised by 'bitsandbytes nf4'"):
        base_from_model(theirs)
