"""The demo's heavy work: the same in processes side by side as in one; how a process fails and ends."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from postil.adapter.peft_files import load_adapter
from postil.base import load_base
from postil.demo.lanes import Lane, lanes
from postil.demo.run import BASE, train_and_judge
from postil.demo.teams import CUT, TEAMS
from postil.demo.work import PROSE, Plan, recipe_of
from postil.errors import RunError
from postil.judging.card.file import read_card

Planned = Callable[[Path], Plan]


def silent(*_: Any) -> None:
    """Nobody watches."""


@pytest.mark.usefixtures("two_cores")
def test_processes_find_what_one_finds(plan_in: Planned, tmp_path: Path) -> None:
    one, two = plan_in(tmp_path / "one"), plan_in(tmp_path / "two")
    events: list[tuple[str, dict[str, Any]]] = []
    trained = train_and_judge(two, lambda *event: events.append(event))
    torch.set_num_threads(1)
    alone = train_and_judge(one, silent)
    for team in TEAMS:
        assert [event["done"] for what, event in events if what == f"training {team.name}"] == [1, 2]
        assert any(what == f"judging {team.name}" for what, _ in events)
        digests = {*trained[team.name]["digests"], *alone[team.name]["digests"]}
        assert len(digests) == 1  # the base is in all processes, before and after, the same bits
        for note in ("adapter", *(["cut"] if team.name == CUT else [])):
            mine, other = (load_adapter(plan.run(team) / note).tensors for plan in (two, one))
            assert mine.keys() == other.keys()
            assert any(bool(tensor.any()) for key, tensor in mine.items() if "lora_B" in key)
            for key, tensor in mine.items():
                torch.testing.assert_close(tensor, other[key], rtol=1e-3, atol=1e-5)
            cards = [read_card(plan.run(team) / note) for plan in (two, one)]
            nats = [card.general["nats"].measures["nats"].adapter.value for card in cards if card is not None]
            assert nats[0] == pytest.approx(nats[1], rel=1e-5)


def test_a_note_is_held_to_what_it_may_be_asked(plan_in: Planned, tmp_path: Path) -> None:
    plan = plan_in(tmp_path)
    for team in TEAMS:
        held = {
            scope: recipe_of(plan, dataclasses.replace(team, scope=scope)).general for scope in ("task", "assistant")
        }
        assert held == {"task": PROSE, "assistant": None}  # None: the prose and the chat prompts that ship
        assert recipe_of(plan, team).training.kl_weight > 0


@pytest.mark.base
def test_the_upper_third_of_the_base_is_adapted() -> None:
    count = load_base(BASE).config.num_hidden_layers
    assert Plan(BASE, "cpu", Path()).layers == tuple(range(count - count // 3, count))


def test_a_job_that_fails_says_why(plan_in: Planned, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan_in(tmp_path), base=str(tmp_path / "nothing"))
    for count in (1, 2):
        with lanes(count, plan, silent) as submit:
            failed: Future[Any] = submit("train", "tools")
            with pytest.raises((RunError, ValueError), match=str(tmp_path / "nothing")):
                failed.result()


def test_a_process_that_is_killed_is_one_sentence(plan_in: Planned, tmp_path: Path) -> None:
    lane = Lane.open(plan_in(tmp_path), 1)
    os.kill(lane.process.pid, signal.SIGKILL)
    with pytest.raises(RunError, match=r"was killed, perhaps for want of memory\. With OMP_NUM_THREADS=1"):
        lane.ask("train", "tools", silent)
    lane.close()


def test_a_process_ends_with_its_parent_s_input(plan_in: Planned, tmp_path: Path) -> None:
    lane = Lane.open(plan_in(tmp_path), 1)
    assert lane.process.stdin is not None
    lane.process.stdin.close()
    assert lane.process.wait(timeout=120) == 0
    lane.close()
