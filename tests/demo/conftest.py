"""A tiny base in a directory, a plan of few rows on it, and the demo run in whole on both, once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from byte_base import byte_base
from postil.demo import run as story
from postil.demo.run import Demo, run_demo
from postil.demo.service import Service, publish_notes
from postil.demo.teams import TEAMS
from postil.demo.work import Plan
from postil.registry import Policy, Registry

LENIENT = Policy(gate="general.nats < base + 100")  # what no training has been given may be published in a test


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base's directory."""
    base, place = byte_base(context=2048), tmp_path_factory.mktemp("tiny") / "base"
    base.model.save_pretrained(place)
    base.tokenizer.save_pretrained(place)
    return str(place)


@pytest.fixture(scope="session")
def plan_in(tiny: str) -> Callable[[Path], Plan]:
    """plan_in(out): two steps of training, three rows to judge on, the upper layer of two."""
    return lambda out: Plan(tiny, "cpu", out, steps=2, limit=3, general_tokens=600, layers=(1,))


def publish_leniently(registry: Registry, plan: Plan) -> Service:
    """publish_notes, where every name's policy lets the demo's notes through."""
    for team in TEAMS:
        registry.set_policy(team.name, LENIENT)
    return publish_notes(registry, plan)


@pytest.fixture(scope="session")
def demo(plan_in: Callable[[Path], Plan], tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo in one process, published by a lenient policy."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTIL_HOME", str(out.parent / "home"))
        patch.setattr(story, "Plan", lambda _base, _device, place: plan_in(place))
        patch.setattr(story, "publish_notes", publish_leniently)
        torch.set_num_threads(1)
        return run_demo(out)


@pytest.fixture
def two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
