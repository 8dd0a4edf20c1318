"""The demo's registry: notes published by its policy, live versions answering, a name rolled back and forward."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from postil.adapter import attach
from postil.adapter.model import AdaptedModel
from postil.demo.teams import BY_NAME, CUT, TEAMS
from postil.demo.work import Plan
from postil.engine import Engine, Request, unbroken
from postil.errors import Refused
from postil.judging.sets.target import Target, read_target
from postil.registry import Registry
from postil.registry.finding import LIVE
from postil.registry.state import Event

ASKED = 8  # questions of each team in the batch


@dataclass(frozen=True, slots=True)
class Served:
    """What a name's live version answered to its team's questions."""

    version: str
    answers: tuple[str, ...]


@dataclass(slots=True)
class Service:
    """What the registry let through and what its live versions answered. refused: the policy's sentence by what it
    was about; back, forward: the answers of CUT's name after its roll-back and its promotion."""

    passed: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    live: dict[str, Served] = field(default_factory=dict)
    base: dict[str, tuple[str, ...]] = field(default_factory=dict)
    requests: int = 0
    seconds: float = 0.0
    back: Served | None = None
    forward: Served | None = None
    history: dict[str, list[Event]] = field(default_factory=dict)

    @property
    def proven(self) -> bool:
        """Whether another version answered after the roll-back, otherwise somewhere, and the first one, word for
        word, after the way forward."""
        if self.back is None or self.forward is None:
            return False
        live = self.live[CUT]
        return self.forward == live and self.back.version != live.version and self.back.answers != live.answers


def publish_notes(registry: Registry, plan: Plan) -> Service:
    """Publish every team's note under its name, and CUT's a second time, cut; what the policy refuses is kept out."""
    found = Service()
    notes = {team.name: (team, "adapter") for team in TEAMS} | {f"{CUT} (cut)": (BY_NAME[CUT], "cut")}
    for what, (team, note) in notes.items():
        try:
            version = registry.publish(plan.run(team) / note, team.name)
        except Refused as problem:
            found.refused[what] = str(problem)
        else:
            found.passed[what] = version.gate.sentence if version.gate is not None else ""
    return found


def serve(model: AdaptedModel, registry: Registry, plan: Plan, found: Service) -> None:
    """Load every name's live version, answer for all of them and for the bare base in one batch, then roll CUT's name
    back and forward again and ask it anew each time."""
    names = [name for name in registry.names() if name in {team.name for team in TEAMS} and _is_live(registry, name)]
    targets = {name: _questions(model, plan, name) for name in names}
    live = {name: _load(model, registry, name) for name in names}
    sides = [(name, side) for name in names for side in (None, name)]
    asked = [_requests(model, targets[name], side) for name, side in sides]
    began = time.perf_counter()
    told = _answers(model, [request for some in asked for request in some])
    found.requests, found.seconds = len(told), time.perf_counter() - began
    for (name, side), some in zip(sides, asked, strict=True):
        answers, told = tuple(told[: len(some)]), told[len(some) :]
        if side is None:
            found.base[name] = answers
        else:
            found.live[name] = Served(live[name], answers)
    if CUT in names and len(registry.state(CUT).stack(LIVE)) > 1:
        newest = live[CUT]
        registry.rollback(CUT)
        found.back = _again(model, registry, targets[CUT])
        registry.promote(CUT, newest)
        found.forward = _again(model, registry, targets[CUT])
    found.history = {name: registry.history(name) for name in registry.names()}


def _is_live(registry: Registry, name: str) -> bool:
    return LIVE in registry.state(name).live


def _load(model: AdaptedModel, registry: Registry, name: str) -> str:
    """Put a name's live version in the place of its note; returns which one it is."""
    if name in model.residents:
        model.remove(name)
    attach(model, registry.load(name), name=name)
    return registry.version(name).digest


def _questions(model: AdaptedModel, plan: Plan, name: str) -> Target:
    team = BY_NAME[name]
    return read_target(str(team.file("test")), model.base, team.rows, limit=plan.limit or ASKED)


def _requests(model: AdaptedModel, target: Target, adapter: str | None) -> list[Request]:
    return [target.request(adapter, item.ids, model.base.context) for item in target.items]


def _answers(model: AdaptedModel, requests: Sequence[Request]) -> list[str]:
    with Engine(model, max_batch=128) as engine:
        return [answer.text.strip() for answer in unbroken(engine.run(requests))]


def _again(model: AdaptedModel, registry: Registry, target: Target) -> Served:
    version = _load(model, registry, CUT)
    return Served(version, tuple(_answers(model, _requests(model, target, CUT))))
