"""The demo's heavy work, in processes side by side: each team's note is trained, base and notes are scored."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from postil.adapter import LoraConfig, attach
from postil.adapter.model import AdaptedModel
from postil.adapter.peft_files import load_adapter, save_adapter
from postil.base import Base, load_base
from postil.data import load_data
from postil.demo.teams import BY_NAME, TEAMS, Team
from postil.errors import RunError
from postil.judging.rows import shipped_text
from postil.judging.scoring import Losses, row_losses, windows
from postil.kernels.dense import multiplies
from postil.training import train

SETTINGS: dict[str, Any] = {"schedule": "linear", "warmup": 8, "batch_size": 8}
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
    """One note's training: seconds, rows, and (step, loss) of each step."""

    seconds: float
    rows: int
    curve: list[tuple[int, float]]


def train_team(model: AdaptedModel, plan: Plan, team: Team, watch: Watch | None) -> Trained:
    """Train a team's note and save it; the model ends without it."""
    data = load_data(team.rows("train", plan.rows), model.base, team.options)
    attach(model, LoraConfig(layers_to_transform=upper_half(model)), name=team.name, seed=0)
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
    return Trained(seconds, len(data.samples), curve)


def upper_half(model: AdaptedModel) -> tuple[int, ...]:
    """The layers nearer to the output: training them alone spares half the backward pass."""
    count = int(model.model.config.get_text_config().num_hidden_layers)
    return tuple(range(count // 2, count))


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


def train_and_score(
    model: AdaptedModel, plan: Plan, watch: Watch | None = None
) -> tuple[dict[str, Trained], dict[str | None, dict[str, Losses]]]:
    """Every team's training, and the losses of the bare base (None) and of every team's note.

    On a CPU with several cores in up to three processes, each on its part of them: with a small model one core's
    work is done sooner beside another's than by both together (bench/LOG.md). Raises RunError where one is killed.
    """
    count = min(len(TEAMS), torch.get_num_threads()) if plan.device == "cpu" else 1
    if count == 1:
        done = {team.name: train_team(model, plan, team, watch) for team in TEAMS}
        return done, {None: losses(model, plan, None)} | {team.name: losses(model, plan, team) for team in TEAMS}
    trained: dict[str, Trained] = {}
    with _processes(count, plan, watch) as pool:
        training: dict[Future[Trained], str] = {pool.submit(_train, team.name): team.name for team in TEAMS}
        scoring: dict[str | None, Future[dict[str, Losses]]] = {None: pool.submit(_losses, None)}
        for future in as_completed(training):
            name = training[future]
            trained[name] = future.result()
            scoring[name] = pool.submit(_losses, name)
        return trained, {name: found.result() for name, found in scoring.items()}


@contextmanager
def _processes(count: int, plan: Plan, watch: Watch | None) -> Iterator[ProcessPoolExecutor]:
    """Processes that hold a base of their own; what they tell goes to `watch`; on an error they are ended."""
    context = multiprocessing.get_context("spawn")
    events = context.SimpleQueue()
    others = set(multiprocessing.active_children())
    arguments = (plan, max(torch.get_num_threads() // count, 1), events)
    listener = threading.Thread(target=_listen, args=(events, watch), daemon=True)
    listener.start()
    try:
        with ProcessPoolExecutor(count, context, _open, arguments) as pool:
            try:
                yield pool
            except BaseException:
                for child in set(multiprocessing.active_children()) - others:
                    child.terminate()
                raise
        events.put(None)
        listener.join()
    except BrokenProcessPool as error:
        raise RunError(
            "one of the demo's processes was ended from outside, perhaps for want of memory; "
            "with OMP_NUM_THREADS=1 there is only one"
        ) from error


def _listen(events: Any, watch: Watch | None) -> None:
    while (event := events.get()) is not None:
        if watch is not None:
            watch(*event)


_here: dict[str, Any] = {}  # of a process of `train_and_score`: its plan, model and events


def _open(plan: Plan, threads: int, events: Any) -> None:
    torch.set_num_threads(threads)
    _here.update(plan=plan, model=attach(plan.open()), events=events)


def _train(name: str) -> Trained:
    return train_team(_here["model"], _here["plan"], BY_NAME[name], lambda *event: _here["events"].put(event))


def _losses(name: str | None) -> dict[str, Losses]:
    return losses(_here["model"], _here["plan"], BY_NAME[name] if name else None)
