"""The child of `postil convert`: a pickle of tensors in, safetensors out; imports nothing else of postil."""

from __future__ import annotations

import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

CODE, UNUSABLE, STORAGE = 10, 11, 12  # exit codes, each with one line of reason on standard output
SPARE = 1 << 30  # bytes beside four times the file
SECONDS = 240  # of processor time
REFUSED = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.startfile",
           "pty.spawn")  # fmt: skip
BROKEN = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, OSError, MemoryError)


class RefusedAction(Exception):
    """Something that reading tensors never needs."""


def main(source: str, target: str) -> tuple[int, str]:
    """Convert one file; returns (exit code, reason)."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    limit(os.path.getsize(source))
    sys.addaudithook(watch)
    try:
        value: Any = torch.load(source, map_location="cpu", weights_only=True)
    except RefusedAction as problem:
        return CODE, str(problem)
    except pickle.UnpicklingError as problem:
        return explain(str(problem))
    except BROKEN as problem:
        return UNUSABLE, f"torch cannot read it ({type(problem).__name__})"
    found = type(value).__name__
    if not isinstance(value, dict):
        return UNUSABLE, f"it holds a {found}, not tensors by name"
    for key, tensor in value.items():
        if not isinstance(key, str) or not isinstance(tensor, torch.Tensor):
            return UNUSABLE, f"{key!r} is a {type(tensor).__name__}, not a tensor with a name"
        if tensor.layout is not torch.strided:
            return UNUSABLE, f"{key} is stored as {tensor.layout}, not dense"
    try:
        # a copy each: tensors that share memory are refused by safetensors
        copies = {key: tensor.detach().clone(memory_format=torch.contiguous_format) for key, tensor in value.items()}
    except (RuntimeError, MemoryError):
        return UNUSABLE, "its tensors are larger than the file could hold"
    try:
        save_file(copies, target)
    except (SafetensorError, OSError) as problem:
        return STORAGE, first_line(problem)
    return 0, ""


def limit(size: int) -> None:
    """Bound memory and time, where the system can."""
    try:
        import resource
    except ImportError:  # Windows has no such limits; the parent's timeout holds there
        return
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():  # Linux: the address space of Python and torch is there already
        mapped = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 4 * size + SPARE,) * 2)


def watch(event: str, _arguments: tuple[Any, ...]) -> None:
    """An audit hook (PEP 578), which cannot be taken off again: no network, no other program."""
    if event.startswith(REFUSED):
        raise RefusedAction(event)


def explain(message: str) -> tuple[int, str]:
    """(exit code, reason) for torch's account of a pickle that weights_only refuses."""
    name = re.search(r"GLOBAL (\S+)", message)
    if name:
        return CODE, f"it names {name[1]}"
    inner = [part.strip() for part in message.split("\n\n")][1:2]  # around it stands advice to trust the file
    return UNUSABLE, f"torch refuses to read it ({first_line(inner[0] if inner else message)})"


def first_line(problem: BaseException | str) -> str:
    """The first line of a text, or the kind of an error without one."""
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__


if __name__ == "__main__":
    code, reason = main(*sys.argv[1:])
    print(reason)
    sys.exit(code)
