"""convert: pickles that are hostile, huge, broken or no adapter, and the child that alone opens them."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from postil.adapter import convert as converting
from postil.adapter import convert_child
from postil.adapter.convert import convert
from postil.adapter.peft_files import load_adapter
from postil.errors import AdapterError, StorageError

A, B = (f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB")
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An adapter directory that lacks only adapter_model.bin."""
    place = tmp_path / "old"
    place.mkdir()
    (place / "adapter_config.json").write_text(json.dumps(CONFIG))
    return place


def good() -> dict[str, torch.Tensor]:
    return {A: torch.randn(2, 16), B: torch.randn(16, 2)}


def write(value: Any) -> Callable[[Path], None]:
    return lambda file: torch.save(value, file)


def cut(file: Path) -> None:
    torch.save(good(), file)
    file.write_bytes(file.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (write({A: torch.zeros(1, 1).expand(10**6, 10**6)}), "its tensors are larger than the file could hold"),
        (write([torch.zeros(2)]), "it holds a list, not tensors by name"),
        (write({A: 3}), f"{A!r} is a int, not a tensor with a name"),
        (cut, "adapter_model.bin is no pickled adapter: torch cannot read it"),
        (
            lambda file: file.write_bytes(pickle.dumps(print)),
            "adapter_model.bin is no pickled adapter: torch refuses",
        ),
        (write(good() | {B: torch.full((16, 2), float("nan"))}), "holds NaN or infinite values"),
        (write({A: good()[A]}), "lora_B.weight is missing"),
    ],
    ids=["bomb", "list", "number", "cut", "global", "NaN", "half"],
)
def test_files_that_are_no_adapter(old: Path, tmp_path: Path, make: Callable[[Path], Any], said: str) -> None:
    make(old / "adapter_model.bin")
    with pytest.raises(AdapterError) as caught:
        convert(old, tmp_path / "new")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_tensors_that_share_memory_or_are_views_come_out_whole(old: Path, tmp_path: Path) -> None:
    whole = torch.randn(2, 16)
    torch.save(
        {A: torch.nn.Parameter(whole), B: whole.T}, old / "adapter_model.bin", _use_new_zipfile_serialization=False
    )
    made = load_adapter(convert(old, tmp_path / "new"))
    assert made.config.alpha == 4
    assert torch.equal(made.tensors[A.removeprefix("base_model.model.")], whole)
    assert torch.equal(made.tensors[B.removeprefix("base_model.model.")], whole.T)


def test_what_is_not_to_be_converted(old: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"old holds no adapter_model\.bin; name the directory of a pickled"):
        convert(old, tmp_path / "new")
    torch.save(good(), old / "adapter_model.bin")
    with pytest.raises(StorageError, match="old is a directory with files in it already"):
        convert(old, old)
    (old / "adapter_config.json").write_text(json.dumps(CONFIG | {"use_dora": True}))
    with pytest.raises(AdapterError, match="use_dora set"):
        convert(old, tmp_path / "new")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import time; time.sleep(60)", "was not read in 0.5 s; it is broken or hostile, do not use it"),
        ("import os; os.abort()", "ended the process that read it (exit -6); it is broken or hostile"),
        ("print('disk full'); raise SystemExit(12)", "could not be written to (disk full); free some space"),
    ],
)
def test_a_child_that_fails(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, said: str) -> None:
    torch.save(good(), old / "adapter_model.bin")
    (tmp_path / "child.py").write_text(code)
    monkeypatch.setattr(convert_child, "__file__", str(tmp_path / "child.py"))
    if "sleep" in code:
        monkeypatch.setattr(converting, "SECONDS", 0.5)
    with pytest.raises((AdapterError, StorageError)) as caught:
        convert(old, tmp_path / "new")
    assert said in str(caught.value)


def test_the_child_knows_no_secret(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(good(), old / "adapter_model.bin")
    (tmp_path / "child.py").write_text("import os; print('HF_TOKEN' in os.environ); raise SystemExit(11)")
    monkeypatch.setattr(convert_child, "__file__", str(tmp_path / "child.py"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    with pytest.raises(AdapterError, match="no pickled adapter: False;"):
        convert(old, tmp_path / "new")


@pytest.mark.parametrize(
    "action",
    ["import socket; socket.create_connection(('127.0.0.1', 9))", "import os; os.system('true')",
     "import subprocess; subprocess.run(['true'])", "import os; os.fork()"],
)  # fmt: skip
def test_the_child_has_no_network_and_starts_no_program(action: str) -> None:
    code = (
        f"import sys\nsys.path.insert(0, {str(Path(convert_child.__file__).parent)!r})\n"
        f"import convert_child\nsys.addaudithook(convert_child.watch)\n"
        f"try:\n    {action}\nexcept convert_child.RefusedAction as refused:\n    print('refused', refused)\n"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("refused "), done.stderr


def test_the_child_has_a_limit_of_memory(tmp_path: Path) -> None:
    code = (
        f"import sys\nsys.path.insert(0, {str(Path(convert_child.__file__).parent)!r})\n"
        "import convert_child\nconvert_child.limit(1000)\n"
        "try:\n    bytearray(2 * convert_child.SPARE)\nexcept MemoryError:\n    print('limited')\n"
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("the address space is bounded on Linux alone")
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "limited\n", done.stderr
