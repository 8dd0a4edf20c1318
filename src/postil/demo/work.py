"""The demo's heavy work, each job by postil's own path: a recipe is run, a note judged, cut, judged again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from postil.adapter.config import LoraConfig
from postil.adapter.peft_files import load_adapter, save_adapter
from postil.adapter.shrink import shrink
from postil.base import Base, live_digest, load_base
from postil.data.shipped import SHIPPED
from postil.demo.teams import BY_NAME, Team
from postil.judging.judge import judge
from postil.judging.options import GeneralOptions, JudgeOptions
from postil.kernels.dense import multiplies
from postil.reporting.reported import PREDICTIONS
from postil.training.options import TrainOptions
from postil.training.recipe import Recipe, prepare

TRAINING: dict[str, Any] = {
    "schedule": "linear", "warmup": 8, "batch_size": 8, "epochs": 1,
    "kl_weight": 1.0, "watch_windows": 1,
}  # fmt: skip
PROSE = str(files("postil.data") / "samples" / "hold_prose.jsonl")  # without chat
RANK = 4  # of the cut note
RUNS = "runs"

Watch = Callable[[str, dict[str, Any]], None]  # told what is done, with {"done", "total", "told"}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done. Everything is written below `out`. steps, limit: of a training, and of the rows judged on,
    where fewer than all. general_tokens: of prose that is judged on; the gate asks for 8,192 at least.
    layers: that are adapted: the third nearest to the output, which spares two thirds of the backward pass."""

    base: str
    device: str
    out: Path
    steps: int | None = None
    limit: int | None = None
    general_tokens: int = 8_720
    layers: Sequence[int] = tuple(range(20, 30))

    @property
    def dtype(self) -> str:
        """float32 where the processor has no instructions for bfloat16: the faster one there."""
        return "float32" if self.device == "cpu" and not multiplies(torch.bfloat16) else "bfloat16"

    def open(self) -> Base:
        """The base."""
        return load_base(self.base, dtype=self.dtype, device=self.device)

    def run(self, team: Team) -> Path:
        """A team's run directory."""
        return self.out / RUNS / team.name


def run_job(plan: Plan, job: str, name: str, watch: Watch) -> dict[str, Any]:
    """One of JOBS, by name, for a team; the answer is plain data."""
    return JOBS[job](plan, name, watch)


def train_team(plan: Plan, name: str, watch: Watch) -> dict[str, Any]:
    """Train a team's note into its run directory; the seconds, and the base's live digests before and after."""
    began = time.perf_counter()
    job = prepare(recipe_of(plan, BY_NAME[name]))
    before = live_digest(job.base.model)

    def told(event: dict[str, Any]) -> None:
        watch(f"training {name}", _event(event["step"], event["total_steps"], f"loss {event['loss']:.2f}"))

    job.run(told)
    job.model.remove("default")
    return {"seconds": time.perf_counter() - began, "digests": [before, live_digest(job.base.model)]}


def recipe_of(plan: Plan, team: Team) -> Recipe:
    """The recipe that a team's note is trained by; it lies beside the note."""
    return Recipe(
        base=plan.base, data=str(team.file("train")), out=str(plan.run(team)), valid_share=0.0, dtype=plan.dtype,
        device=plan.device, rows=team.rows, general=None if team.scope == "assistant" else PROSE,
        lora=LoraConfig(layers_to_transform=tuple(plan.layers)),
        training=TrainOptions(**TRAINING | {**team.training, "steps": plan.steps}),
    )  # fmt: skip


def judge_team(plan: Plan, name: str, watch: Watch) -> dict[str, Any]:
    """Judge a team's note on its held-out rows, prose and chat; the card goes into the note's directory."""
    team = BY_NAME[name]
    _judge(plan, team, plan.run(team) / "adapter", plan.run(team) / PREDICTIONS, f"judging {name}", watch)
    return {}


def cut_team(plan: Plan, name: str, watch: Watch) -> dict[str, Any]:
    """Cut a team's note to RANK beside it, and judge what is left: its second version."""
    team = BY_NAME[name]
    save_adapter(shrink(load_adapter(plan.run(team) / "adapter"), rank=RANK).adapter, plan.run(team) / "cut")
    _judge(plan, team, plan.run(team) / "cut", None, f"judging {name}, cut to rank {RANK}", watch)
    return {}


def _judge(plan: Plan, team: Team, note: Path, predictions: Path | None, what: str, watch: Watch) -> None:
    options = JudgeOptions(
        metrics=(team.metric,), metric_options={team.metric: dict(team.options)} if team.options else {},
        limit=plan.limit, scope=team.scope, general=GeneralOptions(tokens=plan.general_tokens),
    )  # fmt: skip

    def told(event: dict[str, Any]) -> None:
        watch(what, _event(event["done"], event["total"], event["phase"]))

    judge(
        plan.open(), note, target=str(team.file("test")), train=str(team.file("train")), options=options,
        chat=SHIPPED if team.scope == "assistant" else None,  # what is only ever asked its own task meets no other
        predictions=predictions, watch=told,
    )  # fmt: skip


def _event(done: int, total: int, told: str = "") -> dict[str, Any]:
    return {"done": done, "total": total, "told": told}


JOBS = {"train": train_team, "judge": judge_team, "cut": cut_team}
