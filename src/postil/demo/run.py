"""The demo's story: three notes trained, judged, published by the registry's policy, answering in one batch."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from postil.adapter import attach, detach
from postil.base import live_digest
from postil.demo.lanes import lanes
from postil.demo.report import picture, write_page
from postil.demo.service import Service, publish_notes, serve
from postil.demo.teams import CUT, TEAMS, Team
from postil.demo.work import RUNS, Plan, Watch
from postil.errors import JudgeError
from postil.files import check_vacant, write_json, write_text
from postil.judging.card.file import read_card
from postil.judging.card.model import Comparison, ScoreCard
from postil.registry import Registry

BASE = "smollm2-135m-instruct"
REGISTRY = "registry"

UNFINISHED: dict[str, Any] = {"good": False, "base_unchanged": None, "teams": {}}  # of a demo that was stopped

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class TeamResult:
    """What one team got. refused: why its note was not let through; empty where it was."""

    team: Team
    card: ScoreCard
    seconds: float  # of training
    refused: str = ""

    @property
    def target(self) -> Comparison:
        """The team's own measure."""
        assert self.card.target is not None
        return self.card.target.measures[self.card.target.main]

    def general(self, part: str) -> Comparison | None:
        """The nats per token of prose ("nats") or of "chat"."""
        found = self.card.general.get(part)
        return found.measures["nats"] if found is not None else None

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.refused:
            return "refused"
        return "published" if self.card.scope == "assistant" else "published for its own task alone"


@dataclass(frozen=True, slots=True)
class Demo:
    """The whole result."""

    teams: list[TeamResult]
    service: Service
    base: dict[str, str]
    digests: frozenset[str]  # of the base's live tensors, in every process, before and after everything
    seconds: float
    report: Path

    @property
    def unchanged(self) -> bool:
        """Whether the base's live tensors were the same bits everywhere, always."""
        return len(self.digests) == 1

    @property
    def good(self) -> bool:
        """All three better and through the gate, the roll-back proven, the base bit for bit as before."""
        return not any(result.refused for result in self.teams) and self.service.proven and self.unchanged


def run_demo(
    out: str | Path,
    *,
    device: str = "cpu",
    tell: Tell = lambda _: None,
    watch: Watch = lambda _, __: None,
) -> Demo:
    """Run the demo into directory `out` (runs, registry, report.html, result.json), a new one or an earlier demo's,
    whose runs and registry are made anew.

    `watch` is told how far each piece of work is, from other threads. Raises StorageError where anything else lies in
    `out`, RunError where one of its processes ends.
    """
    began = time.perf_counter()
    out = Path(out)
    if is_demo(out):
        for earlier in (RUNS, REGISTRY):
            shutil.rmtree(out / earlier, ignore_errors=True)
    else:
        check_vacant(out)
    plan = Plan(BASE, device, out)
    base = plan.open()
    digests = {live_digest(base.model)}
    write_json(out / "result.json", UNFINISHED)
    tell("training and judging three notes, each beside the bare base")
    trained = train_and_judge(plan, watch)
    digests |= {digest for done in trained.values() for digest in done["digests"]}
    registry = Registry(out / REGISTRY)
    tell("publishing what the policy of each name lets through")
    service = publish_notes(registry, plan)
    tell("answering for the live versions and for the bare base in one batch; rolling one back and forward")
    model = attach(base)
    serve(model, registry, plan, service)
    detach(model)
    digests.add(live_digest(base.model))
    count = sum(parameter.numel() for parameter in base.model.parameters())
    demo = Demo(
        teams=[
            TeamResult(team, _card(plan, team), trained[team.name]["seconds"], service.refused.get(team.name, ""))
            for team in TEAMS
        ],
        service=service,
        base={"name": base.source, "parameters": f"{count / 1e6:.1f} M"},
        digests=frozenset(digests),
        seconds=time.perf_counter() - began,
        report=out / "report.html",
    )
    write_page(demo, plan)
    write_text(out / "curves.svg", picture(demo, plan))
    write_json(out / "result.json", summary(demo))
    return demo


def train_and_judge(plan: Plan, watch: Watch) -> dict[str, dict[str, Any]]:
    """Every team's note trained and judged, and CUT's cut and judged again; what each training answered.

    On a CPU with several cores in up to three processes, each on its part of them: with a small model one core's
    work is done sooner beside another's than by both together (bench/LOG.md). Raises RunError where one ends.
    """
    count = min(len(TEAMS), torch.get_num_threads()) if plan.device == "cpu" and sys.executable else 1
    trained: dict[str, dict[str, Any]] = {}
    with lanes(count, plan, watch) as submit:
        longest = sorted(TEAMS, key=lambda team: (-team.training.get("epochs", 1), team.name != CUT))
        waiting = {submit("train", team.name): ("train", team.name) for team in longest}
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                job, name = waiting.pop(future)
                answer = future.result()
                if job == "train":
                    trained[name] = answer
                    waiting[submit("judge", name)] = ("judge", name)
                elif job == "judge" and name == CUT:  # what the base said to the note is known to the cut one
                    waiting[submit("cut", name)] = ("cut", name)
    return trained


def is_demo(directory: Path) -> bool:
    """Whether a directory holds the result.json of an earlier demo, finished or not."""
    try:
        found = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and UNFINISHED.keys() <= found.keys()


def _card(plan: Plan, team: Team) -> ScoreCard:
    card = read_card(plan.run(team) / "adapter")
    if card is None:
        raise JudgeError(f"{plan.run(team) / 'adapter'} holds no score card; run the demo again")
    return card


def summary(demo: Demo) -> dict[str, Any]:
    """The figures as plain data."""
    service = demo.service
    return {
        "good": demo.good,
        "seconds": round(demo.seconds, 1),
        "base_unchanged": demo.unchanged,
        "batch": {"requests": service.requests, "seconds": round(service.seconds, 1)},
        "rolled_back": service.proven,
        "refused": service.refused,
        "teams": {
            result.team.name: {
                "train_seconds": round(result.seconds, 1),
                "measure": result.team.measure,
                "scope": result.card.scope,
                "verdict": result.verdict,
                "base_score": round(result.target.base.value, 1),
                "score": round(result.target.adapter.value, 1),
                "general": {
                    part: [round(end, 4) for end in (found.difference.low, found.difference.high)]
                    for part in ("nats", "chat")
                    if (found := result.general(part)) is not None
                },
                "version": live.version if (live := service.live.get(result.team.name)) is not None else None,
            }
            for result in demo.teams
        },
    }
