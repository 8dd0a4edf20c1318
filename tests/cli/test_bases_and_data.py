"""postil base, data show and doctor, the help, and model directories that are missing, broken or of no use."""

from __future__ import annotations

import io
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from postil.base.catalog import names


def test_base_list_names_every_known_base_whole(postil: Any) -> None:
    result = postil("base", "list")
    assert result.code == 0
    for name in names():
        assert [line for line in result.out.splitlines() if line.strip().startswith(f"{name} ")]
    assert " no " in result.out  # none is in this test's own cache


def test_base_show_tells_the_facts(postil: Any, refusal: Any, base: Path) -> None:
    result = postil("base", "show", base)
    assert result.code == 0
    facts = dict(line.strip().split("  ", 1) for line in result.out.splitlines())
    assert facts["architecture"] == "llama"
    assert facts["fingerprint"].startswith("sha256:")
    assert "(did you mean 'smollm2-135m-instruct'?)" in refusal("base", "get", "smollm2-135-instruct")
    assert "is no directory here and no known base" in refusal("base", "show", base / "nothing")


@pytest.mark.parametrize(
    "words", [("generate", "hi"), ("train", "--data", "rows.jsonl", "--out", "out"), ("data", "show", "rows.jsonl")]
)
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("missing", "does not exist"),
        ("empty", "is empty: it needs config.json, weights and a tokenizer."),
        ("truncated", "model.safetensors is truncated or corrupt (it is cut off: "),
        ("corrupt", "model.safetensors is truncated or corrupt (its header wants 18446744073709551615 bytes"),
        ("NaN", "has weights that are not finite (NaN or infinite) in model.norm.weight"),
        ("config", "config.json is not valid JSON (line 1"),
        ("tokenizer", "has no tokenizer (tokenizer.json): download it again, whole."),
        ("code", "wants to run code of its own (modeling.py): read it, then allow it"),
    ],
)
def test_broken_bases(
    refusal: Any, postil: Any, base: Path, changed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...], fault: str, said: str,
) -> None:  # fmt: skip
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        if fault == "NaN":
            tensors["model.norm.weight"][3] = float("nan")

    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n' * 3)
    place = changed(base, "model.safetensors", spoil)
    weights = place / "model.safetensors"
    if fault in ("missing", "empty"):
        shutil.rmtree(place)
    if fault == "empty":
        place.mkdir()
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    if fault == "corrupt":
        weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
    if fault == "config":
        (place / "config.json").write_text("{")
    if fault == "tokenizer":
        (place / "tokenizer.json").unlink()
    if fault == "code":
        (place / "modeling.py").write_text("raise SystemExit\n")
    if words[0] == "data" and fault in ("truncated", "corrupt", "NaN"):
        assert postil(*words, "--base", place).code == 0  # the weights are not read
        return
    assert said in refusal(*words, "--base", place)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "hi", "-n", 2),
        ("chat",),
        ("train", "--data", "rows.jsonl", "--dry-run"),
        ("data", "show", "rows.jsonl"),
        ("doctor",),
    ],
)
def test_code_of_a_base_runs_where_it_is_allowed(
    postil: Any, refusal: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    Path("rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n' * 3)
    place = tmp_path / "base"
    shutil.copytree(base, place)
    (place / "modeling.py").write_text("raise SystemExit\n")
    assert "allow it with --trust-remote-code" in refusal(*words, "--base", place)
    assert postil(*words, "--base", place, "--trust-remote-code").code == 0


def test_names_that_are_no_base(refusal: Any) -> None:
    assert "(did you mean 'smollm2-135m-instruct'?)" in refusal("generate", "hi", "--base", "smollm2-135-instruct")
    message = refusal("generate", "hi", "--base", "nobody-here/no-such-model")
    assert "the hub cannot be reached to fetch it: check the network, or give a model directory." in message


def test_data_show_prints_samples_and_counts(postil: Any, base: Path, rows: Path) -> None:
    result = postil("data", "show", rows, "--base", base, "--rows", 2)
    assert result.code == 0
    assert result.out.count("<|im_start|>assistant") == 2
    assert "⟦yes" in result.out  # what is learned stands out without colour, too
    assert "format prompt: 20 samples," in result.out
    assert "longest sample 39 tokens, limit 128" in result.out  # the base's context, as in training


def test_data_show_refuses_as_training_does(refusal: Any, base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "completion": ""}\n')
    assert "a.jsonl:1: 'completion' is empty" in refusal("data", "show", tmp_path / "a.jsonl", "--base", base)
    message = refusal("data", "show", tmp_path / "a.jsonl", "--base", base, "--format", "caht")
    assert message.startswith("rows: format: Input should be 'auto', 'chat'")


def test_doctor_tells_machine_and_paths(postil: Any) -> None:
    result = postil("doctor")
    assert result.code == 0
    facts = dict(line.strip().split("  ", 1) for line in result.out.splitlines())
    assert facts["torch"].startswith(torch.__version__)
    assert {"postil", "python", "processor", "memory", "GPU", "adapted_linear", "attention"} <= facts.keys()


def test_commands_and_help(postil: Any, refusal: Any) -> None:
    assert refusal("trian") == "No such command 'trian' (did you mean 'train'?)"
    assert refusal("adapters", "dif") == "No such command 'dif' (did you mean 'diff'?)"
    assert refusal("merge", "x", "--base", "y") == "Missing option '--out' / '-o' (see postil merge --help)"
    assert postil("--version").out == f"{version('postil')}\n"
    result = postil("--help")
    assert result.code == 0
    for name in ("train", "generate", "chat", "inspect", "merge", "convert", "doctor", "base", "data", "adapters"):
        assert f"  {name} " in result.out


def test_data_show_reads_as_a_recipe_would(postil: Any, refusal: Any, base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "p", "answer": "c"}\n{"question": "p", "answer": "ccccccccc"}\n')
    words = ("data", "show", tmp_path / "a.jsonl", "--base", base, "--format", "raw")
    columns = ("--columns", "prompt=question", "--columns", "completion=answer")
    result = postil(*words, *columns, "--separator", " => ", "--max-length", 10)
    assert result.code == 0
    assert "p => ⟦c" in result.out
    assert "ccccccccc" not in result.out
    assert "1 row longer than the limit, left out: 2" in " ".join(result.out.split())
    cut = postil(*words, *columns, "--separator", " => ", "--max-length", 10, "--too-long", "truncate")
    assert cut.code == 0
    assert "ccccc" in cut.out
    assert "longer than the limit, cut at their end: 2" in " ".join(cut.out.split())
    assert "rows: too_long: Input should be 'drop', " in refusal(*words, *columns, "--too-long", "cut")
    assert "unknown column 'promt' (did you mean 'prompt'?)" in refusal(*words, "--columns", "promt=question")
    assert refusal(*words, "--columns", "prompt") == (
        "--columns prompt: write name=column, such as --columns prompt=question"
    )
    twice = refusal(*words, *columns, "--columns", "prompt=answer")
    assert twice == "--columns names a column for 'prompt' twice; give one"
