"""Fingerprints: equal for the same base however stored, different for any other byte."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from postil.base import base_from_model, cache_directory, directory_source, fingerprint, live_digest, load_base
from postil.base.fingerprint import live_source
from postil.errors import BaseModelError

Make = Callable[..., Path]


def rewrite(directory: Path, **tensors: torch.Tensor) -> None:
    path = directory / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}, path)


def edit(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=7))


def test_does_not_depend_on_sharding_layout_or_volatile_fields(make_directory: Make) -> None:
    whole, sharded, other = make_directory("a"), make_directory("b", shard="20KB"), make_directory("c")
    edit(other, transformers_version="9.9", _name_or_path="x", torch_dtype="float16", use_cache=False)
    rewrite(other)
    assert directory_source(whole) == directory_source(sharded) == directory_source(other)
    assert directory_source(whole).startswith("sha256:")


@pytest.mark.parametrize("change", ["byte", "name", "config", "dtype", "shape"])
def test_any_change_gives_another_source(make_directory: Make, change: str) -> None:
    directory = make_directory()
    before = directory_source(directory)
    path = directory / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    head = state["lm_head.weight"]
    if change == "byte":
        head.view(torch.uint8)[7, 3] ^= 1
    elif change == "name":
        state["lm_head.weigth"] = state.pop("lm_head.weight")
    elif change == "dtype":
        state["lm_head.weight"] = head.view(torch.int32)
    elif change == "shape":
        state["lm_head.weight"] = head.reshape(32, 259)
    else:
        edit(directory, rope_theta=5.0)
    save_file(state, path)
    assert directory_source(directory) != before


def test_a_model_in_memory_has_the_source_of_what_it_saves(make_directory: Make) -> None:
    for tied in (True, False):
        directory = make_directory(f"tied-{tied}", tie_word_embeddings=tied)
        model = LlamaForCausalLM.from_pretrained(directory)
        assert live_source(model) == directory_source(directory)
        model.config._name_or_path = ""
        base = base_from_model(model)
        assert base.directory is None
        assert base.fingerprint() == load_base(directory).fingerprint()


def test_a_model_changed_in_memory_makes_no_claim(directory: Path) -> None:
    stored = load_base(directory).fingerprint()
    model = LlamaForCausalLM.from_pretrained(directory)
    assert base_from_model(model).fingerprint() == stored
    with torch.no_grad():
        model.lm_head.weight.mul_(-3)
    changed = base_from_model(model)
    assert changed.directory == directory
    assert changed.fingerprint().source not in (stored.source, "")
    assert changed.fingerprint().source == live_source(model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_loaded_in_another_dtype_is_the_stored_one(directory: Path, dtype: str) -> None:
    def loaded() -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))

    assert base_from_model(loaded()).fingerprint() == load_base(directory, dtype=dtype).fingerprint()
    model = loaded()
    with torch.no_grad():
        model.model.norm.weight[3] += 1
    assert base_from_model(model).fingerprint().source == live_source(model) != directory_source(directory)


def test_a_base_fully_trained_is_another(directory: Path, tmp_path: Path) -> None:
    base = load_base(directory)
    before = base.fingerprint()
    base.changed()
    assert base.fingerprint() == before  # it was said to have changed and has not
    with torch.no_grad():
        base.model.lm_head.weight.add_(1)
    assert base.fingerprint() == before
    base.changed()
    after = base.fingerprint()
    assert after != before
    base.model.save_pretrained(tmp_path / "tuned")
    assert after.source == directory_source(tmp_path / "tuned")


def test_stored_names_without_the_inner_models_prefix(make_directory: Make) -> None:
    """As GPT-2's own files have them, with buffers of older versions beside."""
    config = GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    directory = make_directory("gpt2", model=GPT2LMHeadModel(config))
    path = directory / "model.safetensors"
    state = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(state | {"h.0.attn.bias": torch.ones(1, 1, 64, 64)}, path, metadata={"format": "pt"})
    model = GPT2LMHeadModel.from_pretrained(directory)
    assert base_from_model(model).fingerprint().source == directory_source(directory)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] += 1
    assert base_from_model(model).fingerprint().source != directory_source(directory)


def test_a_quick_check_answers_from_the_cache_and_verify_hashes_anew(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = directory_source(directory)
    assert (cache_directory() / "fingerprints.json").is_file()
    with monkeypatch.context() as patch:
        patch.setattr(fingerprint, "compute_source", lambda directory: pytest.fail("hashed again"))
        assert directory_source(directory) == before
        with pytest.raises(pytest.fail.Exception, match="hashed again"):
            directory_source(directory, verify=True)
    os.utime(directory / "model.safetensors", ns=(0, 0))
    assert directory_source(directory) == before


@pytest.mark.parametrize("how", ["in place", "another file", "header"])
def test_bytes_changed_with_their_time_kept_are_noticed(
    directory: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by rsync -a, cp -p, tar, and a snapshot put back: the size and the time of modification are the old ones."""
    monkeypatch.setattr(fingerprint, "_BEGINNING", 1 << 12)  # this file is small, and its last byte lies beyond
    path = directory / "model.safetensors"
    before, status, raw = directory_source(directory), path.stat(), bytearray(path.read_bytes())
    if how == "header":
        at = raw.index(b"layers.0.mlp.gate")
        raw[at + 7 : at + 8] = b"1"
        other = raw.index(b"layers.1.mlp.gate", at + 9)
        raw[other + 7 : other + 8] = b"0"
    else:
        raw[-1] ^= 1
    place = path.with_name("new") if how == "another file" else path
    place.write_bytes(bytes(raw))
    os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(place, path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert directory_source(directory) != before


def test_what_a_quick_check_knows_of_a_file(directory: Path) -> None:
    path = directory / "model.safetensors"
    status, beginning = path.stat(), hashlib.sha256(path.read_bytes()[: 1 << 18]).hexdigest()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, beginning]
    source = directory_source(directory)
    store = cache_directory() / "fingerprints.json"
    record = json.loads(store.read_text())
    (entry,) = record.values()
    assert entry == {"files": entry["files"] | {"model.safetensors": stamp}, "source": source}
    assert set(entry["files"]) == {"config.json", "model.safetensors"}
    for index, known in enumerate(stamp):  # any of them alone
        other = "0" * 64 if isinstance(known, str) else known + 1
        entry["files"]["model.safetensors"] = [*stamp[:index], other, *stamp[index + 1 :]]
        entry["source"] = "sha256:of another"
        store.write_text(json.dumps(record))
        assert directory_source(directory) == source


def test_what_another_process_wrote_down_meanwhile_stays(make_directory: Make) -> None:
    one, other = make_directory("one"), make_directory("other")

    def hashing() -> str:
        directory_source(other)
        return "sha256:one"

    assert fingerprint._cached(one, {}, False, hashing) == "sha256:one"
    assert set(json.loads((cache_directory() / "fingerprints.json").read_text())) == {str(one), str(other)}


def test_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    def write(number: int) -> None:
        for index in range(4):
            fingerprint._cached(tmp_path / f"{number}-{index}", {}, False, lambda: "sha256:x")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert len(json.loads((cache_directory() / "fingerprints.json").read_text())) == 32


def test_a_spoilt_or_unwritable_cache_only_costs_time(directory: Path) -> None:
    before = directory_source(directory)
    (cache_directory() / "fingerprints.json").write_text("[1, ")
    assert directory_source(directory) == before
    (cache_directory() / "fingerprints.json").write_text('{"x": 3}')
    assert directory_source(directory) == before


def test_a_cache_that_cannot_be_written(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POSTIL_HOME", str(tmp_path / "file" / "inside"))
    assert directory_source(directory).startswith("sha256:")


def test_a_broken_directory_is_refused(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BaseModelError, match="truncated or corrupt"):
        directory_source(directory)


def test_forms(directory: Path) -> None:
    assert load_base(directory).fingerprint().form == "fp32"
    assert load_base(directory, dtype="float16").fingerprint().form == "fp16"
    model = LlamaForCausalLM.from_pretrained(directory)
    model.lm_head.to(torch.bfloat16)
    assert base_from_model(model).fingerprint().form == "mixed"
    assert str(load_base(directory).fingerprint()) == f"{directory_source(directory)} (fp32)"


def test_the_form_is_that_at_loading(directory: Path) -> None:
    base = load_base(directory, dtype="bfloat16")
    base.model.register_parameter("note", torch.nn.Parameter(torch.ones(2)))
    assert base.fingerprint().form == "bf16"


def test_live_digest_sees_every_bit(directory: Path) -> None:
    model = load_base(directory).model
    before = live_digest(model)
    assert before == live_digest(load_base(directory).model)
    bits = model.model.layers[1].mlp.down_proj.weight.data.view(torch.int32)
    bits[0, 0] ^= 1
    assert live_digest(model) != before
    bits[0, 0] ^= 1
    assert live_digest(model) == before
    model.model.rotary_emb.inv_freq[0] += 1  # a buffer that is never saved
    assert live_digest(model) != before


def test_live_digest_takes_tied_scalar_and_empty_tensors() -> None:
    module = torch.nn.Module()
    module.first = torch.nn.Linear(2, 2, bias=False)
    module.second = torch.nn.Linear(2, 2, bias=False)
    module.second.weight = module.first.weight
    module.register_buffer("scalar", torch.tensor(True))
    module.register_buffer("empty", torch.empty(0, 3, dtype=torch.bfloat16))
    before = live_digest(module)
    module.scalar.fill_(False)
    assert live_digest(module) != before


def test_weights_without_bytes_are_refused() -> None:
    with pytest.raises(BaseModelError, match="meta device"):
        live_digest(torch.nn.Linear(2, 2, device="meta"))
