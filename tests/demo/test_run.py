"""The demo in whole on a tiny base: run, judged, published, answered, rolled back; and when it is not good."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from postil.adapter.peft_files import load_adapter
from postil.demo import run as story
from postil.demo.run import REGISTRY, UNFINISHED, Demo, is_demo, run_demo, summary
from postil.demo.service import Served
from postil.demo.teams import CUT, TEAMS
from postil.demo.work import RANK, Plan
from postil.judging.card.file import read_card
from postil.registry import Registry


def test_every_note_is_trained_judged_and_served_from_the_registry(demo: Demo) -> None:
    out = demo.report.parent
    registry = Registry(out / REGISTRY)
    assert registry.names() == sorted(team.name for team in TEAMS)
    assert not demo.service.refused
    for result in demo.teams:
        run = out / "runs" / result.team.name
        card = read_card(run / "adapter")
        assert card is not None
        assert card == result.card
        assert card.scope == result.team.scope
        chat = {"chat"} if card.scope == "assistant" else set()
        assert card.general.keys() == {"nats", "kl"} | chat  # what is only asked its own task meets no chat
        assert card.target is not None
        assert card.target.main == result.team.metric.rpartition("/")[2].replace("house_tone.py:", "own.")
        assert len((run / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 2
        assert registry.version(result.team.name).digest == demo.service.live[result.team.name].version
        assert load_adapter(run / "adapter").config.layers_to_transform == (1,)
    assert demo.service.requests == 2 * 3 * len(TEAMS)  # each question of the note and of the base
    assert demo.unchanged


def test_a_cut_note_is_the_second_version_and_is_rolled_back_and_forward(demo: Demo) -> None:
    registry, service = Registry(demo.report.parent / REGISTRY), demo.service
    whole, cut = registry.state(CUT).served
    assert registry.load(f"{CUT}@{cut}").config.r == RANK
    assert registry.load(f"{CUT}@{whole}").config.r == 8
    assert service.back is not None
    assert service.forward is not None
    assert (service.live[CUT].version, service.back.version, service.forward.version) == (cut, whole, cut)
    assert service.forward.answers == service.live[CUT].answers
    assert [event.action for event in service.history[CUT]] == ["policy", "publish", "publish", "rollback", "promote"]


def test_what_proves_a_roll_back(demo: Demo) -> None:
    live = demo.service.live[CUT]
    other = Served("other", tuple(f"{one} more" for one in live.answers))
    proven = dataclasses.replace(demo.service, back=other, forward=live)
    assert proven.proven
    assert dataclasses.replace(demo, service=proven).good
    for wrong in (
        {"back": None},
        {"forward": None},
        {"back": dataclasses.replace(other, answers=live.answers)},  # nobody would have noticed
        {"back": dataclasses.replace(other, version=live.version)},
        {"forward": other},
        {"forward": dataclasses.replace(live, answers=other.answers)},
    ):
        assert not dataclasses.replace(proven, **wrong).proven
        assert not dataclasses.replace(demo, service=dataclasses.replace(proven, **wrong)).good


def test_a_refusal_or_a_changed_base_is_not_good(demo: Demo) -> None:
    live = demo.service.live[CUT]
    proven = dataclasses.replace(demo.service, back=Served("other", ("else",)), forward=live)
    good = dataclasses.replace(demo, service=proven)
    assert good.good
    refused = dataclasses.replace(demo.teams[0], refused="refused: worse")
    assert (refused.verdict, demo.teams[0].verdict) == ("refused", "published for its own task alone")
    wide = demo.teams[0].card.model_copy(update={"scope": "assistant"})
    assert dataclasses.replace(demo.teams[0], card=wide).verdict == "published"
    assert not dataclasses.replace(good, teams=[refused, *demo.teams[1:]]).good
    changed = dataclasses.replace(good, digests=good.digests | {"another"})
    assert (changed.unchanged, changed.good) == (False, False)


def test_the_default_gate_refuses_what_was_hardly_trained(
    plan_in: Callable[[Path], Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(story, "Plan", lambda _base, _device, place: plan_in(place))
    out = tmp_path / "demo"
    found = run_demo(out)
    assert not found.good
    assert {*found.service.refused} == {"tools", "tone", "restaurants", "restaurants (cut)"}
    assert all(why.startswith("refused: ") for why in found.service.refused.values())
    assert not found.service.live
    assert found.report.is_file()
    told = json.loads((out / "result.json").read_text(encoding="utf-8"))
    assert UNFINISHED.keys() <= told.keys()
    assert (told["good"], told["teams"]["tone"]["verdict"], told["teams"]["tone"]["version"]) == (
        False,
        "refused",
        None,
    )

    (out / "runs/tools/mine.txt").write_text("of the earlier demo", encoding="utf-8")
    (out / "mine.txt").write_text("keep me", encoding="utf-8")

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(story, "train_and_judge", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_demo(out)
    assert (out / "mine.txt").is_file()
    assert not (out / "runs").exists()  # runs and registry are made anew
    assert not (out / REGISTRY).exists()
    assert is_demo(out)


def test_the_summary_is_known_as_a_demo(demo: Demo) -> None:
    found = summary(demo)
    assert UNFINISHED.keys() <= found.keys()
    assert found["teams"]["tools"]["version"] == demo.service.live["tools"].version
    assert found["teams"]["tone"]["general"].keys() == {"nats"}
    assert found["base_unchanged"] is True
