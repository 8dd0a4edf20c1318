"""GGUF files: a tiny one written here opens dense, mended and ordinary; a broken one is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from postil.base import live_digest, load_base, show
from postil.base.gguf import write_directory
from postil.errors import BaseModelError

HIDDEN, HEADS, GROUPS, FEED, LAYERS = 64, 4, 2, 96, 2


def tiny_gguf(path: Path, *, cut: str = "smollm", spoilt: bool = False) -> Path:
    """A Llama with Q8_0 matrices, a tied head, and a byte-level tokenizer with white-space merges."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<unk>", "<s>", "</s>", *alphabet, "ĊĊ", "ĠĠ"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ċ Ċ", "Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    chance = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k": (HIDDEN * GROUPS // HEADS, HIDDEN),
            f"blk.{layer}.attn_v": (HIDDEN * GROUPS // HEADS, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_gate": (FEED, HIDDEN),
            f"blk.{layer}.ffn_up": (FEED, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, FEED),
        }
    for name, shape in shapes.items():
        values = chance.standard_normal(shape).astype(np.float32) * (0.1 if len(shape) > 1 else 1.0)
        if spoilt and name == "blk.1.attn_norm":
            values[3] = np.nan
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_opens_as_an_ordinary_dense_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    base = load_base(path)
    assert capfd.readouterr() == ("", "")
    assert (base.dtype, base.context, base.architecture) == (torch.float32, 256, "llama")
    assert (base.directory, base.file) == (None, path)
    assert base.fingerprint().form == "fp32"
    assert base.fingerprint().source.startswith("sha256:")
    config = base.config
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters["rope_theta"] == 100000.0
    assert config.tie_word_embeddings
    assert base.model.lm_head.weight is base.model.model.embed_tokens.weight
    assert not hasattr(config, "quantization_config")
    assert not base.model.is_quantized
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    wanted = gguf.quants.dequantize(stored.data, stored.tensor_type)
    assert np.array_equal(base.model.model.layers[0].mlp.up_proj.weight.numpy(), wanted)


def test_dtype_rounds_once_and_keeps_the_source(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    whole, narrow = load_base(path), load_base(path, dtype="bfloat16")
    assert narrow.fingerprint().source == whole.fingerprint().source
    assert narrow.fingerprint().form == "bf16"
    for ours, theirs in zip(narrow.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(torch.bfloat16))


@pytest.mark.parametrize(("cut", "white"), [("smollm", ["ĊĊ", "7"]), ("gpt-2", ["Ċ", "Ċ", "7"])])
def test_single_digits_are_cut_for_the_vocabularies_that_do_so(tmp_path: Path, cut: str, white: list[str]) -> None:
    tokenizer = load_base(tiny_gguf(tmp_path / "tiny.gguf", cut=cut)).tokenizer
    ids = tokenizer("\n\n7").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == white
    assert tokenizer.decode(ids) == "\n\n7"
    assert tokenizer.model_max_length == 256
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "</s>")


def test_the_directory_written_from_it_loads_in_plain_transformers(tmp_path: Path) -> None:
    base = load_base(tiny_gguf(tmp_path / "tiny.gguf"), dtype="bfloat16")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_directory(base.model, base.tokenizer, tmp_path / name, dtype=torch.bfloat16)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in files)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")
    assert live_digest(plain) == live_digest(base.model)
    text = "a  7 \n\n9 <s>é"
    assert AutoTokenizer.from_pretrained(tmp_path / "a")(text) == base.tokenizer(text)
    assert "transformers_version" not in (tmp_path / "a" / "config.json").read_text()


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    raw = path.read_bytes()
    for cut in (8, 30, 2000, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:cut])
        with pytest.raises(BaseModelError, match=r"tiny\.gguf is truncated or corrupt"):
            load_base(path)
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(BaseModelError, match="is no GGUF file"):
        load_base(path)
    path.unlink()
    with pytest.raises(BaseModelError, match="does not exist"):
        load_base(path)


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf", spoilt=True)
    with pytest.raises(BaseModelError, match=r"not finite .* in model\.layers\.1\.input_layernorm\.weight"):
        load_base(path)


def test_a_directory_with_only_a_gguf_names_it(tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BaseModelError, match=r"name the GGUF file itself: .*tiny\.gguf"):
        load_base(tmp_path)


def test_show(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    assert show(path)["bytes"] == path.stat().st_size


def test_without_accelerate_the_mend_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BaseModelError, match="pip install accelerate"):
        load_base(path)
