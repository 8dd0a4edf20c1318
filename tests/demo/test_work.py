"""The demo's heavy work: the same in processes side by side as in one; how a process fails and ends."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from postil.adapter import attach
from postil.adapter.peft_files import load_adapter
from postil.base import live_digest
from postil.demo import run as story
from postil.demo.lanes import Lane, lanes
from postil.demo.run import BASE, run_demo, train_and_score
from postil.demo.teams import TEAMS
from postil.demo.work import GENERAL, Plan, upper_third
from postil.errors import RunError
from postil.judging.asking.likelihoods import mean_nats


@pytest.fixture
def two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def plan_in(out: Path, base: str = BASE) -> Plan:
    return Plan(base, "cpu", out, rows={"train": 2, "test": 1}, general_tokens=40, window=20)


@pytest.mark.base
@pytest.mark.usefixtures("two_cores")
def test_processes_find_what_one_finds(tmp_path: Path) -> None:
    plan = plan_in(tmp_path / "one")
    model = attach(plan.open())
    events: list[tuple[str, dict[str, Any]]] = []
    two = dataclasses.replace(plan, out=tmp_path / "two")
    trained, found = train_and_score(model, two, lambda *event: events.append(event))
    assert sorted(title for title, _ in events) == sorted(team.title for team in TEAMS)  # a step each

    torch.set_num_threads(1)
    alone, losses = train_and_score(model, plan)
    for team in TEAMS:
        mine, other = trained[team.name], alone[team.name]
        assert (mine.rows, mine.digest) == (other.rows, other.digest) == (2, live_digest(model.model))
        assert mine.curve == [(1, pytest.approx(other.curve[0][1], rel=1e-5))]
        saved, wanted = (load_adapter(place.out / team.name).tensors for place in (two, plan))
        assert saved.keys() == wanted.keys()
        assert any(bool(tensor.any()) for key, tensor in saved.items() if "lora_B" in key)
        for key, tensor in saved.items():
            torch.testing.assert_close(tensor, wanted[key], rtol=1e-3, atol=1e-6)
    assert found.keys() == losses.keys() == {None, *(team.name for team in TEAMS)}
    for name, rows in losses.items():
        assert found[name].keys() == rows.keys() == ({t.name for t in TEAMS} if name is None else {name}) | {GENERAL}
        for kind in rows:
            assert mean_nats(found[name][kind]) == pytest.approx(mean_nats(rows[kind]), rel=1e-5)
    assert len({mean_nats(rows[GENERAL]) for rows in found.values()}) == 1 + len(TEAMS)  # each note is another model
    assert not model.residents
    assert upper_third(model) == tuple(range(20, 30))


@pytest.mark.base
def test_the_whole_demo_on_few_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "Plan", lambda base, _device, out: plan_in(out, base))
    demo = run_demo(tmp_path / "demo")
    assert (demo.batch_rows, demo.general_tokens) == (6, 40)
    assert demo.digest_before == demo.digest_after
    assert [len(result.answers) for result in demo.teams] == [1, 1, 1]
    assert [result.rows for result in demo.teams] == [2, 2, 2]
    assert demo.report.is_file()
    for team in TEAMS:
        assert load_adapter(tmp_path / "demo" / team.name).config.r == 8


def test_a_job_that_fails_says_why(tmp_path: Path) -> None:
    with lanes(1, plan_in(tmp_path, str(tmp_path / "nothing")), None) as submit:
        failed: Future[Any] = submit("losses", None)
        with pytest.raises(RunError, match=str(tmp_path / "nothing")):
            failed.result()


def test_a_process_that_is_killed_is_one_sentence(tmp_path: Path) -> None:
    lane = Lane.open(plan_in(tmp_path), 1)
    os.kill(lane.process.pid, signal.SIGKILL)
    with pytest.raises(RunError, match=r"was killed, perhaps for want of memory\. With OMP_NUM_THREADS=1"):
        lane.ask("losses", None, None)
    lane.close()


@pytest.mark.base
def test_a_process_ends_with_its_parent_s_input(tmp_path: Path) -> None:
    lane = Lane.open(plan_in(tmp_path), 1)
    assert lane.process.stdin is not None
    lane.process.stdin.close()
    assert lane.process.wait(timeout=120) == 0
    lane.close()
