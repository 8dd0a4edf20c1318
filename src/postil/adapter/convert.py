"""Pickled adapters (adapter_model.bin) made safetensors ones; a pickle is only opened in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from postil.adapter import convert_child
from postil.adapter.peft_files import WEIGHTS, assembled, read_config, save_adapter
from postil.errors import AdapterError, StorageError
from postil.files import check_vacant

PICKLE = "adapter_model.bin"
SECONDS = 300  # an adapter of 1 GB takes a few
# What the child may know of this process: enough to find Python's packages, no token and no password.
_ENVIRONMENT = ("HOME", "PATH", "PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH",
                "SYSTEMROOT", "TMPDIR", "TEMP")  # fmt: skip


def convert(directory: str | Path, out: str | Path) -> Path:
    """Read the pickled adapter in `directory` and write it to `out` as save_adapter does; returns `out`.

    The pickle is read with torch's weights_only in a child that cannot reach the network, start a program or
    outgrow its memory and time; what it made is then checked as any adapter is. Raises AdapterError when the
    pickle wants to run code, is no adapter, or is broken; StorageError when the system refuses.
    """
    path, target = Path(directory), Path(out)
    peft = read_config(path)
    file = path / PICKLE
    if not file.is_file():
        if (path / WEIGHTS).is_file():
            raise AdapterError(f"{path} holds {WEIGHTS} already; it needs no converting, use it as it is")
        raise AdapterError(f"{path} holds no {PICKLE}; name the directory of a pickled PEFT adapter")
    check_vacant(target)
    with tempfile.TemporaryDirectory(prefix="postil-convert-") as place:
        made = Path(place) / WEIGHTS
        _run_child(file, made)
        raw = dict(load_file(made))
    return save_adapter(assembled(path, peft, raw, file), target)


def _run_child(file: Path, made: Path) -> None:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    command = [sys.executable, "-P", convert_child.__file__, str(file), str(made)]
    try:
        done = subprocess.run(
            command, env=environment | {"OMP_NUM_THREADS": "1"}, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise AdapterError(f"{file} was not read in {SECONDS} s; it is broken or hostile, do not use it") from None
    if done.returncode == 0:
        return
    reason = done.stdout.strip()
    if done.returncode == convert_child.CODE:
        raise AdapterError(
            f"{file} wants to run code when it is opened ({reason}); none was run: do not trust it, "
            f"ask its maker for {WEIGHTS}"
        )
    if done.returncode == convert_child.UNUSABLE:
        raise AdapterError(f"{file} is no pickled adapter: {reason}; copy it again, or ask its maker for {WEIGHTS}")
    if done.returncode == convert_child.STORAGE:
        raise StorageError(f"{made.parent} could not be written to ({reason}); free some space and run it again")
    raise AdapterError(
        f"{file} ended the process that read it (exit {done.returncode}); it is broken or hostile, do not use it"
    )
