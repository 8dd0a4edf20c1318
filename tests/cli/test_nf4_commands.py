"""The commands on a 4-bit base: quantize, and train, generate, chat and merge with --quant or --into."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nf4")


@pytest.fixture(scope="module")
def trained(made: Path, place: Path, postil: Any) -> Path:
    """An adapter of the tiny base, trained on its 4-bit form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTIL_HOME", str(place / "home"))
        result = postil(
            "train",
            "--base",
            made / "base",
            "--data",
            made / "rows.jsonl",
            "--out",
            place / "run",
            "--method",
            "qlora",
        )
    assert result.code == 0, result
    assert "qlora: learning rate " in result.err
    assert "base in nf4 and torch.float32 on cpu" in result.err
    return place / "run/adapter"


@pytest.fixture(scope="module")
def quantised(made: Path, place: Path, postil: Any) -> Path:
    """The tiny base, written in 4 bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTIL_HOME", str(place / "home"))
        result = postil("quantize", made / "base", "--out", place / "quantised")
    assert (result.code, result.out) == (0, f"{place / 'quantised'}\n"), result
    assert "14 layers in 0.0 MB" in result.err
    return place / "quantised"


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\n"))


def form(adapter: Path) -> str:
    return str(json.loads((adapter / "postil.json").read_text())["base"]["form"])


def test_qlora_trains_on_the_4_bit_form(trained: Path, adapter: Path) -> None:
    assert (form(trained), form(adapter)) == ("nf4", "fp32")
    recipe = yaml.safe_load((trained.parent / "recipe.yaml").read_text())
    assert recipe["training"]["method"] == "qlora"
    ours, dense = (load_file(path / "adapter_model.safetensors") for path in (trained, adapter))
    assert ours.keys() == dense.keys()
    assert any(not torch.equal(ours[key], dense[key]) for key in ours)


def test_lora_on_a_4_bit_base_is_the_same_thing(
    postil: Any, base: Path, rows: Path, trained: Path, tmp_path: Path
) -> None:
    words = ("train", "--base", base, "--data", rows, "--out", tmp_path / "run", "--quant", "nf4")
    assert postil(*words).code == 0
    ours, wanted = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "run/adapter", trained))
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)


def test_a_run_on_a_written_4_bit_base_is_the_same_too(
    postil: Any, quantised: Path, rows: Path, trained: Path, tmp_path: Path
) -> None:
    words = ("train", "--base", quantised, "--data", rows, "--out", tmp_path / "run")
    result = postil(*words)
    assert result.code == 0, result
    ours, wanted = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "run/adapter", trained))
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)
    assert (
        json.loads((tmp_path / "run/adapter/postil.json").read_text())["base"]
        == (json.loads((trained / "postil.json").read_text())["base"])
    )


def test_full_fine_tuning_of_4_bits_is_refused(refusal: Any, base: Path, rows: Path, tmp_path: Path) -> None:
    words = ("train", "--base", base, "--data", rows, "--out", tmp_path / "run", "--method", "full", "--quant", "nf4")
    assert "training.method full changes every weight, and 4-bit weights cannot be: leave quant out" in refusal(
        *words
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "generate", "chat"])
def test_another_form_is_refused(refusal: Any, base: Path, rows: Path, tmp_path: Path, command: str) -> None:
    more = {"train": ("--data", rows, "--out", tmp_path / "run"), "generate": ("hi",), "chat": ()}[command]
    message = refusal(command, *more, "--base", base, "--quant", "nf5")
    assert "nf4" in message
    assert not (tmp_path / "run").exists()


def test_answers_on_the_4_bit_and_on_the_dense_base(postil: Any, base: Path, quantised: Path, trained: Path) -> None:
    words = ("Hello", "-n", 6, "--adapter", trained)
    on_nf4 = postil("generate", *words, "--base", base, "--quant", "nf4")
    written = postil("generate", *words, "--base", quantised)
    dense = postil("generate", *words, "--base", base)
    assert (on_nf4.code, written.code, dense.code) == (0, 0, 0), (on_nf4, written, dense)
    assert on_nf4.out == written.out
    assert "made on the base in nf4" not in on_nf4.err
    assert "the adapter was made on the base in nf4, here it is in fp32" in dense.err


def test_chat_on_a_4_bit_base(postil: Any, base: Path, typed: None) -> None:
    result = postil("chat", "--base", base, "--quant", "nf4", "-n", 4)
    assert result.code == 0, result
    assert result.out.count("\n") >= 1


def test_merging_asks_what_into(refusal: Any, base: Path, trained: Path, adapter: Path, tmp_path: Path) -> None:
    words = ("merge", trained, "--base", base, "--out", tmp_path / "whole")
    assert 'say what to merge into, with into="original" (--into original) or into="dequantised" (' in refusal(*words)
    assert "not 'dense'" in refusal(*words, "--into", "dense")
    dense = ("merge", adapter, "--base", base, "--out", tmp_path / "whole", "--into", "original")
    assert "into='original' is for a 4-bit base" in refusal(*dense)
    assert not (tmp_path / "whole").exists()


def test_merging_into_the_original_and_into_a_dequantised_copy(
    postil: Any, refusal: Any, base: Path, quantised: Path, trained: Path, tmp_path: Path
) -> None:
    logits = {}
    for into, source in (("original", base), ("dequantised", base), ("dequantised", quantised)):
        out = tmp_path / f"{into}-{source.name}"
        result = postil("merge", trained, "--base", source, "--out", out, "--into", into)
        assert (result.code, result.out) == (0, f"{out}\n"), result
        assert "against the adapter on the 4-bit base" in result.err
        model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            logits[out.name] = model.eval()(torch.arange(9)[None]).logits
    original, first, second = logits.values()
    assert torch.equal(first, second)
    assert not torch.allclose(original, first, atol=1e-3)
    words = ("merge", trained, "--base", quantised, "--out", tmp_path / "whole", "--into", "original")
    assert "holds 4-bit weights, the original is not there; give the 16-bit directory as the base" in refusal(*words)


def test_quantize_refuses_what_is_there_and_what_is_4_bit(
    refusal: Any, base: Path, quantised: Path, tmp_path: Path
) -> None:
    assert "nothing was written, name a new directory" in refusal("quantize", base, "--out", quantised)
    message = refusal("quantize", quantised, "--out", tmp_path / "again")
    assert "holds 4-bit weights already: there is nothing to quantise" in message
    assert not (tmp_path / "again").exists()


def test_base_show_says_what_is_in_4_bits(postil: Any, base: Path, quantised: Path) -> None:
    facts = {
        path: dict(line.strip().split("  ", 1) for line in postil("base", "show", path).out.splitlines())
        for path in (base, quantised)
    }
    for key in ("parameters", "fingerprint", "layers", "hidden"):
        assert facts[base][key] == facts[quantised][key]
    assert "'nf4': 18432" in facts[quantised]["dtypes"]
