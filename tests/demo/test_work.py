"""The demo's heavy work: the same in processes side by side as in one, and one sentence where a process dies."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from postil.adapter import attach
from postil.demo.run import BASE
from postil.demo.teams import TEAMS
from postil.demo.work import GENERAL, Plan, train_and_score, upper_half
from postil.errors import RunError
from postil.judging.scoring import mean_nats


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
    found = train_and_score(
        model, dataclasses.replace(plan, out=tmp_path / "two"), lambda *event: events.append(event)
    )
    assert sorted(title for title, _ in events) == sorted(team.title for team in TEAMS)  # a step each

    torch.set_num_threads(1)
    alone = train_and_score(model, plan)
    for team in TEAMS:
        assert found[0][team.name].rows == alone[0][team.name].rows == 2
        assert found[0][team.name].curve == [(1, pytest.approx(alone[0][team.name].curve[0][1], rel=1e-3))]
        assert (tmp_path / "two" / team.name / "adapter_model.safetensors").is_file()
    assert found[1].keys() == alone[1].keys() == {None, *(team.name for team in TEAMS)}
    for name, losses in alone[1].items():
        assert losses.keys() == ({team.name for team in TEAMS} if name is None else {name}) | {GENERAL}
        for kind, rows in losses.items():
            assert mean_nats(found[1][name][kind]) == pytest.approx(mean_nats(rows), rel=1e-2)
    assert not model.residents
    assert upper_half(model) == tuple(range(15, 30))


@pytest.mark.usefixtures("two_cores")
def test_a_process_that_dies_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="one of the demo's processes was ended"):
        train_and_score(None, plan_in(tmp_path, str(tmp_path / "nothing")))  # type: ignore[arg-type]
