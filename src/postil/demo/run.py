"""The demo's story: train three adapters, score them against the bare base, answer for all in one batch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from postil.adapter import attach, detach
from postil.adapter.model import AdaptedModel
from postil.adapter.peft_files import load_adapter
from postil.base import Base, live_digest
from postil.demo.lanes import lanes, losses_of, trained_of
from postil.demo.report import picture, write_report
from postil.demo.teams import TEAMS, Team
from postil.demo.work import GENERAL, Plan, Trained, Watch, losses, train_team
from postil.engine import Engine, unbroken
from postil.files import check_vacant, write_json, write_text
from postil.judging.asking.likelihoods import Losses, mean_nats
from postil.judging.bootstrap import compare
from postil.judging.card.build import NATS, stats_of
from postil.judging.card.model import Estimate

BASE = "smollm2-135m-instruct"

UNFINISHED: dict[str, Any] = {"good": False, "base_unchanged": None, "teams": {}}  # of a demo that was stopped

Tell = Callable[[str], None]


@dataclass(slots=True)
class TeamResult:
    """What one team got: scores of base and adapter, losses in nats per token, the curve, some answers."""

    team: Team
    seconds: float
    rows: int
    base_score: float = 0.0
    score: float = 0.0
    base_loss: float = 0.0
    loss: float = 0.0
    gain: Estimate = field(default_factory=lambda: Estimate(value=0.0, low=0.0, high=0.0))
    general: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)
    answers: list[tuple[str, str, str, str]] = field(default_factory=list)  # asked, wanted, base, adapter

    @property
    def better(self) -> bool:
        """Measurably: the loss gain's whole interval above zero, and the score above the base's."""
        return self.gain.low > 0 and self.score > self.base_score


@dataclass(slots=True)
class Demo:
    """The whole result."""

    teams: list[TeamResult]
    base_general: float
    general_tokens: int
    digest_before: str
    digest_after: str
    seconds: float
    adapter_bytes: int
    batch_rows: int
    batch_seconds: float
    report: Path

    @property
    def good(self) -> bool:
        """All three better, and the base's live tensors bit for bit as before."""
        return all(result.better for result in self.teams) and self.digest_before == self.digest_after


def run_demo(
    out: str | Path,
    *,
    device: str = "cpu",
    tell: Tell = lambda _: None,
    watch: Watch | None = None,
) -> Demo:
    """Run the demo into directory `out` (adapters, report.html, result.json), a new one or an earlier demo's.

    `watch` is called with a team's title and each training event, from other threads. Raises StorageError where
    anything else lies in `out`, RunError where one of its processes ends.
    """
    began = time.perf_counter()
    out = Path(out)
    if not is_demo(out):
        check_vacant(out)
    plan = Plan(BASE, device, out)
    base = plan.open()
    before = live_digest(base.model)
    model = attach(base)
    write_json(out / "result.json", UNFINISHED)
    tell("training three notes, then the losses of base and notes on test rows and general text")
    trained, found = train_and_score(model, plan, watch)
    results, bare = [], found[None]
    for team in TEAMS:
        done, mine = trained[team.name], found[team.name]
        results.append(
            TeamResult(
                team, done.seconds, done.rows, base_loss=mean_nats(bare[team.name]), loss=mean_nats(mine[team.name]),
                gain=gain(bare[team.name], mine[team.name]), general=mean_nats(mine[GENERAL]), curve=done.curve,
            )
        )  # fmt: skip
        attach(model, load_adapter(out / team.name), name=team.name)
    tell("answering for all three teams and for the bare base in one batch")
    requests, seconds = _answered(model, plan, results)
    after = {live_digest(base.model), *(done.digest for done in trained.values())}
    detach(model)
    after.add(live_digest(base.model))
    demo = Demo(
        teams=results,
        base_general=mean_nats(bare[GENERAL]),
        general_tokens=sum(len(window.ids) for window in plan.texts(base.tokenizer)),
        digest_before=before,
        digest_after=before if after == {before} else next(iter(after - {before})),
        seconds=time.perf_counter() - began,
        adapter_bytes=sum(path.stat().st_size for path in (out / TEAMS[0].name).iterdir()),
        batch_rows=requests,
        batch_seconds=seconds,
        report=out / "report.html",
    )
    write_report(demo, base_facts(base))
    write_text(out / "curves.svg", picture(demo))
    write_json(out / "result.json", summary(demo))
    return demo


def train_and_score(
    model: AdaptedModel, plan: Plan, watch: Watch | None = None
) -> tuple[dict[str, Trained], dict[str | None, dict[str, Losses]]]:
    """Every team's training, and the losses of the bare base (None) and of every team's note.

    On a CPU with several cores in up to three processes, each on its part of them: with a small model one core's
    work is done sooner beside another's than by both together (bench/LOG.md). Raises RunError where one ends.
    """
    count = min(len(TEAMS), torch.get_num_threads()) if plan.device == "cpu" and sys.executable else 1
    if count == 1:
        done = {team.name: train_team(model, plan, team, watch) for team in TEAMS}
        return done, {None: losses(model, plan, None)} | {team.name: losses(model, plan, team) for team in TEAMS}
    trained: dict[str, Trained] = {}
    with lanes(count, plan, watch) as submit:
        training = {submit("train", team.name): team.name for team in TEAMS}
        scoring: dict[str | None, Future[Any]] = {None: submit("losses", None)}
        for future in as_completed(training):
            name = training[future]
            trained[name] = trained_of(future.result())
            scoring[name] = submit("losses", name)
        return trained, {name: losses_of(found.result()) for name, found in scoring.items()}


def gain(base: Losses, adapted: Losses) -> Estimate:
    """By how many nats per token the adapter is better, with its 95% interval (paired bootstrap over rows)."""
    found = compare(NATS, stats_of(base), stats_of(adapted)).difference
    return Estimate(value=-found.value, low=-found.high, high=-found.low)


def is_demo(directory: Path) -> bool:
    """Whether a directory holds the result.json of an earlier demo, finished or not."""
    try:
        found = json.loads((directory / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and UNFINISHED.keys() <= found.keys()


def base_facts(base: Base) -> dict[str, str]:
    """What the report says of the base."""
    count = sum(parameter.numel() for parameter in base.model.parameters())
    return {"name": base.source, "parameters": f"{count / 1e6:.1f} M", "fingerprint": base.fingerprint().source}


def _answered(model: AdaptedModel, plan: Plan, results: list[TeamResult]) -> tuple[int, float]:
    """Every test row asked of its adapter and of the bare base, all in one engine run."""
    requests, places = [], []
    for result in results:
        rows = result.team.rows("test", plan.rows)
        for adapter in (None, result.team.name):
            requests += [result.team.request(row, adapter) for row in rows]
            places += [(result, adapter)] * len(rows)
    began = time.perf_counter()
    with Engine(model, max_batch=128) as engine:
        answers = unbroken(engine.run(requests))
    seconds = time.perf_counter() - began
    for result in results:
        rows = result.team.rows("test", plan.rows)
        bare, mine = (
            [
                result.team.answer(a.text)
                for a, place in zip(answers, places, strict=True)
                if place == (result, adapter)
            ]
            for adapter in (None, result.team.name)
        )
        result.base_score = result.team.score(bare, rows)
        result.score = result.team.score(mine, rows)
        result.answers = [
            (
                result.team.asked(row),
                result.team.wanted(row),
                bare[i],
                mine[i],
            )
            for i, row in enumerate(rows[:6])
        ]
    return len(requests), seconds


def summary(demo: Demo) -> dict[str, Any]:
    """The figures as plain data."""
    return {
        "good": demo.good,
        "seconds": round(demo.seconds, 1),
        "base_unchanged": demo.digest_before == demo.digest_after,
        "general": {"tokens": demo.general_tokens, "base": round(demo.base_general, 4)},
        "batch": {"requests": demo.batch_rows, "seconds": round(demo.batch_seconds, 1)},
        "teams": {
            result.team.name: {
                "train_rows": result.rows,
                "train_seconds": round(result.seconds, 1),
                "measure": result.team.measure,
                "base_score": round(result.base_score, 1),
                "score": round(result.score, 1),
                "base_nats": round(result.base_loss, 4),
                "nats": round(result.loss, 4),
                "gain_interval": [round(result.gain.low, 4), round(result.gain.high, 4)],
                "general_nats": round(result.general, 4),
                "better": result.better,
            }
            for result in demo.teams
        },
    }
