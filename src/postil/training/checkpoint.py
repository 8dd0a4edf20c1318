"""Checkpoints between updates: masters, optimiser, place in the data; a run resumes from them to the same bytes."""

from __future__ import annotations

import itertools
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from postil.data.packs import PACKING
from postil.errors import RunError, listed
from postil.files import atomic_directory, remove_leftovers, sha256_file, write_json
from postil.training.identity import machine
from postil.training.optimizer import AdamW

TENSORS, MANIFEST = "state.safetensors", "manifest.json"


@dataclass(slots=True)
class Progress:
    """Where a run stands beside its tensors: updates done, the best validation so far (of those that a guard lets
    pass: best_…; of all: free_…), and the general rise (nats per token over the base) of each. scale: of the sum of
    a step's losses, below 1 where float16's gradients overflowed."""

    step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    since_best: int = 0
    best: torch.Tensor | None = None
    best_rise: float | None = None
    free_step: int = 0
    free_loss: float | None = None
    free_rise: float | None = None
    scale: float = 1.0


def save_checkpoint(run: Path, optimizer: AdamW, progress: Progress, identity: str, keep: int) -> Path:
    """Write `checkpoints/step-N` whole or not at all, then drop the oldest above `keep`."""
    directory = run / "checkpoints" / f"step-{progress.step:08d}"
    tensors = {
        "flat": optimizer.weights.flat.detach(),
        "exp_avg": optimizer.exp_avg,
        "exp_avg_sq": optimizer.exp_avg_sq,
    }
    if progress.best is not None:
        tensors["best"] = progress.best
    with atomic_directory(directory, marker=MANIFEST) as temporary:
        try:
            save_file({key: tensor.cpu() for key, tensor in tensors.items()}, temporary / TENSORS)
        except SafetensorError as error:
            raise OSError(f"{TENSORS}: {error}") from error  # its way to say that the disk is full
        manifest = {
            "step": progress.step,
            "optimizer_step": optimizer.step,
            "best_step": progress.best_step,
            "best_loss": progress.best_loss,
            "since_best": progress.since_best,
            "best_rise": progress.best_rise,
            "free_step": progress.free_step,
            "free_loss": progress.free_loss,
            "free_rise": progress.free_rise,
            "scale": progress.scale,
            "identity": identity,
            "packing": PACKING,
            "machine": machine(optimizer.weights.flat.device),
            "sha256": sha256_file(temporary / TENSORS),
        }
        write_json(temporary / MANIFEST, manifest)
    for old in [other for other in _directories(run) if other != directory][: 1 - keep or None]:
        _drop(old)
    return directory


def load_checkpoint(run: Path, optimizer: AdamW, identity: str) -> tuple[Progress, list[str]]:
    """Fill the optimiser from the newest whole checkpoint; returns the progress and notes for the user.

    A run without a checkpoint starts from the beginning. Raises RunError where the checkpoint belongs to
    another recipe, base or data, or to a postil that packed the rows in another way.
    """
    notes: list[str] = []
    here = machine(optimizer.weights.flat.device)
    root = run / "checkpoints"
    if root.is_dir():
        remove_leftovers(root)
    for directory in reversed(_directories(run)):
        manifest = _whole(directory)
        if manifest is None:
            aside = _set_aside(directory)
            notes.append(f"{directory.name} is not whole: it is {aside.name} now, and was passed over")
            continue
        there = manifest["machine"]
        if manifest.get("packing") != PACKING:
            raise RunError(
                f"{directory} was made by postil {there.get('postil', 'before 0.1')}, which dealt the rows "
                f"out otherwise than {here['postil']}: going on would learn some twice and others never; finish it "
                "there, or start a new run with another --out"
            )
        if manifest["identity"] != identity:
            raise RunError(
                f"{directory} was made with another recipe, base or data; start a new run with another --out, "
                "or restore the recipe"
            )
        other = [f"{key}: {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]
        if other:
            notes.append(
                f"the run continues on another machine or version ({listed(other)}): its bytes will differ from an "
                "unbroken run's"
            )
        tensors = load_file(directory / TENSORS)
        with torch.no_grad():
            optimizer.weights.flat.copy_(tensors["flat"])
        optimizer.exp_avg.copy_(tensors["exp_avg"])
        optimizer.exp_avg_sq.copy_(tensors["exp_avg_sq"])
        optimizer.step = manifest["optimizer_step"]
        optimizer.weights.publish()
        best = tensors.get("best")
        progress = Progress(
            manifest["step"], manifest["best_step"], manifest["best_loss"], manifest["since_best"],
            None if best is None else best.to(optimizer.weights.flat.device),
            manifest["best_rise"], manifest["free_step"], manifest["free_loss"], manifest["free_rise"],
            manifest["scale"],
        )  # fmt: skip
        notes.append(f"going on from step {progress.step}")
        return progress, notes
    return Progress(), notes


def _directories(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; other names are not ours to touch."""
    found = (run / "checkpoints").glob("step-*")
    return sorted(path for path in found if re.fullmatch(r"step-\d{8}", path.name))


def _whole(directory: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint whose tensors are as it says, else None."""
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return manifest if sha256_file(directory / TENSORS) == manifest["sha256"] else None
    except (OSError, ValueError, KeyError):
        return None


def _set_aside(directory: Path) -> Path:
    """Give a checkpoint that is not whole another name, so that its step can be written again."""
    aside = next(
        other
        for n in itertools.count(1)
        if not (other := directory.with_name(f"{directory.name}.damaged-{n}")).exists()
    )
    directory.rename(aside)
    return aside


def _drop(directory: Path) -> None:
    """Remove a checkpoint; what else lies in its directory stays there."""
    for name in (MANIFEST, TENSORS):
        (directory / name).unlink(missing_ok=True)
    with suppress(OSError):
        directory.rmdir()
