"""postil inspect, adapters diff, merge and convert: what they tell and write, and adapters that are broken."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def test_inspect_tells_what_is_in_it(postil: Any, adapter: Path, base: Path) -> None:
    result = postil("inspect", adapter)
    assert result.code == 0
    facts = dict(line.strip().split("  ", 1) for line in result.out.splitlines())
    assert facts["base"].startswith(f"{base}  sha256:")
    assert facts["rank, alpha"] == "8, 16"
    assert facts["modules"] == "k_proj ×2, o_proj ×2, q_proj ×2, v_proj ×2"
    assert facts["parameters"] == "3,584"
    assert facts["size"] == "0.01 MB"
    assert facts["card"] == "data, recipe, result, seen, template_hash, versions"


def test_diff_names_what_differs(postil: Any, adapter: Path, changed: Any) -> None:
    assert postil("adapters", "diff", adapter, adapter).out == "no difference\n"

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        first, second = sorted(tensors)[:2]
        tensors[first] += 1
        tensors[second] = tensors[second].clone()

    other = changed(adapter, "adapter_model.safetensors", edit)
    own = json.loads((other / "postil.json").read_text())
    peft = json.loads((other / "adapter_config.json").read_text())
    own["config"]["alpha"] = peft["lora_alpha"] = 4
    (other / "postil.json").write_text(json.dumps(own))
    (other / "adapter_config.json").write_text(json.dumps(peft))
    lines = postil("adapters", "diff", adapter, other).out.splitlines()
    assert lines[0] == "alpha: 16.0 | 4.0"
    assert lines[1].startswith("1 tensors differ in value, by ")


def test_merge_writes_what_transformers_loads(
    postil: Any, refusal: Any, adapter: Path, base: Path, tmp_path: Path
) -> None:
    result = postil("merge", adapter, "--base", base, "--out", tmp_path / "whole", "--dtype", "bfloat16")
    assert (result.code, result.out) == (0, f"{tmp_path / 'whole'}\n")
    assert re.fullmatch(
        r"a logit moved by [\d.e-]+ at most \(mean [\d.e-]+, logits up to [\d.]+\), the likeliest token "
        r"is the same at \d+ of 97 places against base and adapter apart",
        result.raw_err.strip(),
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert whole.dtype == torch.bfloat16
    before = load_file(base / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(whole.model.layers[0].self_attn.q_proj.weight, before.bfloat16())
    taken = {path: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    message = refusal("merge", adapter, "--base", base, "--out", tmp_path / "whole")
    assert "is a directory with files in it already; nothing was written, name a new directory" in message
    assert {path: path.read_bytes() for path in (tmp_path / "whole").iterdir()} == taken
    file = tmp_path / "note.txt"
    file.write_text("keep me")
    assert "note.txt is a file already" in refusal("merge", adapter, "--base", base, "--out", file)
    assert file.read_text() == "keep me"


@pytest.mark.parametrize("words", [("inspect",), ("generate", "hi", "--adapter"), ("merge", "--out", "x")])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("missing", "does not exist; name a directory that holds adapter_config.json"),
        ("empty", "holds no adapter_config.json; it holds nothing"),
        ("truncated", "adapter_model.safetensors is truncated or corrupt"),
        ("config", "adapter_config.json is no JSON"),
        ("NaN", "holds NaN or infinite values; the adapter is broken, train it again"),
        ("DoRA", "use_dora set: this changes the mathematics"),
        ("pickle", "adapter_model.bin is a pickle, which can run code and is never opened here; `postil convert "),
    ],
)
def test_broken_adapters(
    refusal: Any,
    adapter: Path,
    base: Path,
    changed: Any,
    tmp_path: Path,
    words: tuple[str, ...],
    fault: str,
    said: str,
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        if fault == "NaN":
            next(iter(tensors.values()))[0, 0] = float("nan")

    place = changed(adapter, "adapter_model.safetensors", spoil)
    weights, config = place / "adapter_model.safetensors", place / "adapter_config.json"
    if fault in ("missing", "empty"):
        shutil.rmtree(place)
    if fault == "empty":
        place.mkdir()
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    if fault == "config":
        config.write_text(config.read_text()[:50])
    if fault == "DoRA":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    if fault == "pickle":
        weights.rename(place / "adapter_model.bin")
    more = ("--base", base) if words[0] != "inspect" else ()
    assert said in refusal(*words, place, *more)
    assert not (Path.cwd() / "x").exists()


class Hostile:
    """Unpickled with care for nothing, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_convert_reads_a_pickle_and_writes_safetensors(
    postil: Any, refusal: Any, adapter: Path, base: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    shutil.copytree(adapter, old)
    (old / "postil.json").unlink()
    tensors = load_file(old / "adapter_model.safetensors")
    (old / "adapter_model.safetensors").unlink()
    torch.save(tensors, old / "adapter_model.bin")
    result = postil("convert", old, "--out", tmp_path / "new")
    assert (result.code, result.out) == (0, f"{tmp_path / 'new'}\n")
    assert not (tmp_path / "new/adapter_model.bin").exists()
    found = load_file(tmp_path / "new/adapter_model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], value) for key, value in tensors.items())
    assert postil("generate", "hi", "--base", base, "--adapter", tmp_path / "new", "-n", 2).code == 0
    message = refusal("convert", tmp_path / "new", "--out", tmp_path / "again")
    assert "holds adapter_model.safetensors already; it needs no converting" in message


def test_convert_runs_no_code(refusal: Any, adapter: Path, tmp_path: Path) -> None:
    old, mark = tmp_path / "old", tmp_path / "mark"
    shutil.copytree(adapter, old)
    (old / "adapter_model.safetensors").unlink()
    torch.save({"a": Hostile(mark)}, old / "adapter_model.bin")
    message = refusal("convert", old, "--out", tmp_path / "new")
    assert "adapter_model.bin wants to run code when it is opened (it names posix.mkdir); none was run" in message
    assert not mark.exists()
    assert not (tmp_path / "new").exists()
