"""The demo's heavy work: a team's note is trained and saved, base and notes are scored."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from postil.adapter import LoraConfig, attach
from postil.adapter.model import AdaptedModel
from postil.adapter.peft_files import load_adapter, save_adapter
from postil.base import Base, live_digest, load_base
from postil.data import load_data
from postil.demo.teams import TEAMS, Team
from postil.judging.asking.likelihoods import Losses, row_losses, windows
from postil.judging.sets.read import shipped_text
from postil.kernels.dense import multiplies
from postil.training import train

SETTINGS: dict[str, Any] = {"schedule": "linear", "warmup": 8, "batch_size": 8, "epochs": 1}
GENERAL = "general"  # beside the teams' names

Watch = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done: rows by split, tokens of general text in windows of `window`; notes go to out/<team>."""

    base: str
    device: str
    out: Path
    rows: dict[str, int] = field(default_factory=lambda: {"train": 304, "test": 40})  # whole batches of 8
    general_tokens: int = 8_192
    window: int = 512

    def open(self) -> Base:
        """The base, in float32 where the processor has no instructions for bfloat16: the faster one there."""
        slow = self.device == "cpu" and not multiplies(torch.bfloat16)
        return load_base(self.base, dtype="float32" if slow else "bfloat16", device=self.device)

    def texts(self, tokenizer: Any) -> list[Any]:
        """The windows of general text."""
        return windows(
            tokenizer, [row.value["text"] for row in shipped_text().rows], self.general_tokens, self.window
        )


@dataclass(frozen=True, slots=True)
class Trained:
    """One note's training: seconds, rows, (step, loss) of each step, and the base's live digest after it."""

    seconds: float
    rows: int
    curve: list[tuple[int, float]]
    digest: str


def train_team(model: AdaptedModel, plan: Plan, team: Team, watch: Watch | None) -> Trained:
    """Train a team's note and save it; the model ends without it."""
    data = load_data(team.rows("train", plan.rows), model.base, team.options)
    attach(model, LoraConfig(layers_to_transform=upper_third(model)), name=team.name, seed=0)
    curve: list[tuple[int, float]] = []

    def note(event: dict[str, Any]) -> None:
        curve.append((event["step"], event["loss"]))
        if watch is not None:
            watch(team.title, event)

    began = time.perf_counter()
    adapter = train(model, data, name=team.name, learning_rate=team.learning_rate, watch=note, **SETTINGS)
    seconds = time.perf_counter() - began
    assert adapter is not None
    save_adapter(adapter, plan.out / team.name)
    model.remove(team.name)
    return Trained(seconds, len(data.samples), curve, live_digest(model.model))


def upper_third(model: AdaptedModel) -> tuple[int, ...]:
    """The layers nearest to the output: training them alone spares two thirds of the backward pass."""
    count = int(model.model.config.get_text_config().num_hidden_layers)
    return tuple(range(count - count // 3, count))


def losses(model: AdaptedModel, plan: Plan, team: Team | None) -> dict[str, Losses]:
    """A note's losses on its test rows and on general text; the bare base's (None) on all teams' rows and on it."""
    name = None
    if team is not None:
        name = team.name
        attach(model, load_adapter(plan.out / team.name), name=name)
    found = {
        other.name: row_losses(
            model, load_data(other.rows("test", plan.rows), model.base, other.options).samples, name
        )
        for other in (TEAMS if team is None else (team,))
    }
    found[GENERAL] = row_losses(model, plan.texts(model.base.tokenizer), name)
    if team is not None:
        model.remove(team.name)
    return found
