"""The guard: what it measures, which state it keeps, what it says it cost, and that a killed run stays the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_documents, tiny_model, tiny_samples

from postil.adapter import AdaptedModel, LoraConfig, attach
from postil.data import Sample, pack
from postil.errors import RunError
from postil.kernels.layout import Layout
from postil.training import TrainOptions, train
from postil.training.batch import to_device
from postil.training.checkpoint import Progress
from postil.training.general import Documents, split_general
from postil.training.guard import Gauge, Gauges, Guarded, keep
from postil.training.loop import Outcome, run
from postil.training.optimizer import AdapterWeights, FullWeights
from postil.training.validation import validate

GUARD = 0.05
HOT = {
    "learning_rate": 5e-2,
    "epochs": 6,
    "schedule": "constant",
    "warmup": 20,
    "valid_every": 1,
    "patience": 0,
    "kl_weight": 0,
}


def fresh(seed: int = 1, **settings: Any) -> AdaptedModel:
    model = tiny_model()
    attach(model, LoraConfig(**({"r": 4} | settings)), seed=seed)
    return model


def gauge_of(model: AdaptedModel) -> Gauge:
    general = split_general(tiny_documents(), TrainOptions(), model.base)
    return Gauge.of(model, general.watched, 4096, nullcontext)


def guarded(model: AdaptedModel, valid: int = 6, **settings: Any) -> tuple[Outcome, list[dict[str, Any]], list[str]]:
    """A run with the watched general text: its outcome, its events, and what it told."""
    events: list[dict[str, Any]] = []
    told: list[str] = []
    held_out = tiny_samples()[:valid]  # rows that are learned: they gain as long as the general text is spoilt
    out = settings.pop("out", None)
    outcome = run(
        model, tiny_samples(), held_out, general=tiny_documents(), out=out, name="default",
        options=TrainOptions(**(HOT | settings)), watch=events.append, tell=told.append,
    )  # fmt: skip
    return outcome, events, told


# What is measured


def test_the_gauge_measures_nats_and_kl_over_the_base() -> None:
    model = fresh()
    gauge = gauge_of(model)
    general = split_general(tiny_documents(), TrainOptions(), model.base)
    assert gauge.base_nats == pytest.approx(validate(model, general.watched, None, 4096), abs=1e-5)
    untouched = gauge.measure(model, model.resident("default"))
    assert untouched["general_rise"] == pytest.approx(0, abs=1e-6)
    assert untouched["general_kl"] == pytest.approx(0, abs=1e-6)
    resident = model.resident("default")
    resident.flat.add_(torch.randn(resident.flat.shape, generator=torch.Generator().manual_seed(2)) * 0.2)
    found = gauge.measure(model, resident)
    nats = validate(model, general.watched, resident, 4096)
    assert found["general_nats"] == pytest.approx(nats, abs=1e-5)
    assert found["general_rise"] == pytest.approx(nats - gauge.base_nats, abs=1e-5)
    total = tokens = 0.0
    for window in general.watched:
        ids, positions, _ = to_device(pack([window]), model)
        layout = Layout.packed([len(ids)], model.spans_for({"default": 1.0}, len(ids)))
        with torch.no_grad(), model.using(layout):
            q = model.logits(model.hidden(ids, positions), layout.spans).log_softmax(-1)
        with torch.no_grad(), model.using(Layout.packed([len(ids)])):
            p = model.logits(model.hidden(ids, positions), Layout.packed([]).spans).log_softmax(-1)
        rows = torch.from_numpy(window.weights).nonzero(as_tuple=True)[0] - 1  # a document's first token is no target
        total += float((p.exp() * (p - q)).sum(-1)[rows].sum())
        tokens += len(rows)
    assert found["general_kl"] > 0.01
    assert found["general_kl"] == pytest.approx(total / tokens, rel=1e-3)


def test_full_fine_tuning_is_measured_against_the_weights_it_began_with() -> None:
    model = tiny_model()
    weights = FullWeights.of(model.model)
    general = split_general(tiny_documents(), TrainOptions(), model.base)
    gauge = Gauge.of(model, general.watched, 4096, weights.origin())
    weights.flat.mul_(0.7)
    weights.publish()
    found = gauge.measure(model, None)
    other = tiny_model()
    assert gauge.base_nats == pytest.approx(validate(other, general.watched, None, 4096), abs=1e-5)
    assert found["general_nats"] == pytest.approx(validate(model, general.watched, None, 4096), abs=1e-5)
    assert found["general_rise"] > 0.05
    assert found["general_kl"] > 0.05


# What is kept


def test_an_early_state_within_the_guard_is_kept_and_its_cost_is_said() -> None:
    free, free_events, _ = guarded(unguarded := fresh())
    assert free.guarded is None
    chosen = min(free_events, key=lambda event: event["valid_loss"])
    assert free.best_step == chosen["step"] > 10  # the more it is trained, the better it is at the rows
    assert chosen["general_rise"] > 4 * GUARD
    spoilt = gauge_of(unguarded).measure(unguarded, unguarded.resident("default"))
    assert spoilt["general_rise"] == pytest.approx(chosen["general_rise"], abs=1e-5)

    outcome, events, told = guarded(model := fresh(), guard=GUARD)
    drop = {"seconds", "watch_seconds"}
    assert [{k: v for k, v in event.items() if k not in drop} for event in events] == [
        {k: v for k, v in event.items() if k not in drop} for event in free_events
    ]  # the guard watches, it does not train
    passing = [event for event in events if event["general_rise"] <= GUARD]
    best = min(passing, key=lambda event: event["valid_loss"])
    assert 0 < len(passing) < len(events)
    assert (outcome.best_step, outcome.valid_loss) == (best["step"], best["valid_loss"])
    kept = gauge_of(model).measure(model, model.resident("default"))
    assert kept["general_rise"] == pytest.approx(best["general_rise"], abs=1e-5)
    assert kept["general_rise"] <= GUARD
    done = outcome.guarded
    assert done is not None
    assert (done.step, done.loss, done.rise) == (best["step"], best["valid_loss"], best["general_rise"])
    assert (done.free_step, done.free_loss, done.free_rise) == (
        chosen["step"], chosen["valid_loss"], chosen["general_rise"]
    )  # fmt: skip
    assert done.seconds == pytest.approx(sum(event["watch_seconds"] for event in events))
    assert told[-1] == done.sentence()
    kept = f"guard 0.05: kept step {done.step} (held-out loss {done.loss:.4f}, general {done.rise:+.3f} nats)"
    assert kept in told[-1]
    assert f"it cost {done.loss - done.free_loss:.4f} nats of held-out loss; watching took" in told[-1]


def test_where_no_state_passes_the_untouched_one_is_kept_and_that_is_an_error(tmp_path: Path) -> None:
    cold = {"learning_rate": 1.0, "warmup": 0, "steps": 3}
    outcome, events, told = guarded(model := fresh(), guard=0.0, out=tmp_path, **cold)
    assert all(event["general_rise"] > 0 for event in events)
    assert (outcome.best_step, outcome.valid_loss) == (0, None)
    assert torch.equal(model.resident("default").flat, fresh().resident("default").flat)
    assert told == []
    with pytest.raises(RunError, match="so the untouched state of step 0 was kept and nothing was learned; lower"):
        train(model, tiny_samples(), valid=tiny_samples()[:6], general=tiny_documents(), out=tmp_path, guard=0.0,
              **(HOT | cold))  # fmt: skip
    assert torch.equal(model.resident("default").flat, fresh().resident("default").flat)


def test_without_held_out_rows_the_last_state_that_passes_is_kept() -> None:
    outcome, events, told = guarded(model := fresh(), valid=0, guard=GUARD, patience=3)
    last = max(event["step"] for event in events if event["general_rise"] <= GUARD)
    assert len(events) == last + 3  # then patience ended it
    assert outcome.best_step == last
    assert outcome.valid_loss is None
    assert gauge_of(model).measure(model, model.resident("default"))["general_rise"] <= GUARD
    assert f"kept step {last} (general " in told[-1]
    assert "without it" not in told[-1]


def test_full_fine_tuning_keeps_a_state_within_the_guard() -> None:
    model = tiny_model()
    events: list[dict[str, Any]] = []
    options = TrainOptions(**(HOT | {"method": "full", "learning_rate": 3e-3, "guard": GUARD}))
    outcome = run(model, tiny_samples(), tiny_samples()[:6], general=tiny_documents(), out=None, name="",
                  options=options, watch=events.append)  # fmt: skip
    assert events[-1]["general_rise"] > 2 * GUARD
    assert outcome.guarded is not None
    assert outcome.guarded.step > 0
    windows = split_general(tiny_documents(), options, model.base).watched
    rise = validate(model, windows, None, 4096) - validate(tiny_model(), windows, None, 4096)
    assert rise == pytest.approx(outcome.guarded.rise, abs=1e-4)
    assert rise <= GUARD


def test_a_state_of_a_general_loss_that_is_no_number_does_not_pass() -> None:
    from postil.training.checkpoint import Progress
    from postil.training.guard import keep
    from postil.training.optimizer import AdapterWeights

    weights = AdapterWeights.of(fresh().resident("default"))
    progress = Progress(step=3)
    keep(progress, weights, TrainOptions(guard=9.0), 1.0, float("nan"))
    assert progress.best is None
    assert progress.since_best == 1


def test_the_guards_sentence_when_it_cost_nothing() -> None:
    same = Guarded(0.05, 7, 1.25, 0.0312, 7, 1.25, 0.0312, 3.4)
    assert same.sentence() == (
        "guard 0.05: kept step 7 (held-out loss 1.2500, general +0.031 nats), the best state of all; "
        "it cost nothing; watching took 3 s"
    )
    assert "seconds" not in same.facts()


# Killed and resumed

KILLED = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from tiny import tiny_documents, tiny_model, tiny_samples
from postil.adapter import LoraConfig, attach
from postil.training import train
model = tiny_model()
attach(model, LoraConfig(r=4, dropout=0.1, target_modules="all-linear"), seed=1)
print("ready", flush=True)
train(model, tiny_samples(), out={out!r}, valid=tiny_samples()[:6], general=tiny_documents(), epochs=8, patience=0,
      accumulation=2, checkpoint_every=2, valid_every=3, learning_rate=2e-2, guard=0.1, kl_weight=0.3, kl_rows=3,
      general_share=0.25, general_tokens=12, watch=lambda event: print(event["step"], flush=True))
sys.stdout.write("bytes " + model.resident("default").flat.numpy().tobytes().hex() + "\\n")
"""


def run_script(out: Path, kill_after: str | None = None, delay: float = 0.0) -> str | None:
    """Run the training in a process of its own; kill -9 it `delay` seconds after it printed `kill_after`."""
    code = KILLED.format(tests=str(Path(__file__).parent), out=str(out))
    result = None
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("bytes "):
                result = line.split()[1]
            if kill_after is not None and line.strip() == kill_after:
                time.sleep(delay)
                os.kill(process.pid, signal.SIGKILL)
                break
    return result


def test_a_killed_run_with_everything_on_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole = run_script(tmp_path / "whole")
    assert whole is not None
    for kill_after, delay in (("8", 0.003), ("17", 0.0)):
        run_script(tmp_path / "broken", kill_after, delay)
    assert run_script(tmp_path / "broken") == whole
    logs = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    ]
    assert [line["step"] for line in logs[1]] == list(range(1, 25))
    clocks = {"seconds", "kl_seconds", "watch_seconds"}
    assert [{k: v for k, v in line.items() if k not in clocks} for line in logs[0]] == [
        {k: v for k, v in line.items() if k not in clocks} for line in logs[1]
    ]
    assert any(line.get("general_rise", 0) > 0.1 for line in logs[0])  # the guard had something to do


def test_a_finished_run_still_knows_what_its_guard_did(tmp_path: Path) -> None:
    first, _, _ = guarded(fresh(), guard=GUARD, out=tmp_path)
    again, events, told = guarded(model := fresh(), guard=GUARD, out=tmp_path)
    assert events == []
    assert again.guarded == first.guarded
    assert told[-1] == again.guarded.sentence()
    assert gauge_of(model).measure(model, model.resident("default"))["general_rise"] <= GUARD


@pytest.mark.parametrize("change", [{"guard": 0.2}, {"kl_weight": 0.1}, {"watch_windows": 1}])
def test_another_guard_or_text_is_another_run(change: dict[str, float], tmp_path: Path) -> None:
    guarded(fresh(), guard=GUARD, out=tmp_path, steps=2)
    with pytest.raises(RunError, match="another recipe, base or data"):
        guarded(fresh(), out=tmp_path, steps=2, **({"guard": GUARD} | change))


def test_other_general_text_is_another_run(tmp_path: Path, samples: list[Sample]) -> None:
    train(fresh(), samples, general=tiny_documents(), out=tmp_path, steps=2)
    with pytest.raises(RunError, match="another recipe, base or data"):
        train(fresh(), samples, general=tiny_documents(seed=1), out=tmp_path, steps=2)


def test_a_held_out_loss_that_is_no_number_is_never_the_best() -> None:
    model = fresh()
    weights, progress = AdapterWeights.of(model.resident("default")), Progress()
    for step, loss in enumerate([float("nan"), 2.0, float("inf"), 3.0], 1):
        progress.step = step
        keep(progress, weights, TrainOptions(), loss, None)
    assert (progress.best_step, progress.best_loss, progress.since_best) == (2, 2.0, 2)
    assert progress.free_loss == 2.0


# Both kinds


def test_the_guard_looks_at_the_kind_that_suffers_more() -> None:
    model = fresh()
    resident = model.resident("default")
    resident.flat.add_(torch.randn(resident.flat.shape, generator=torch.Generator().manual_seed(2)) * 0.2)
    chat = [
        replace(one, weights=np.where(np.arange(20) < 9, 0, one.weights).astype(np.float32))
        for one in tiny_documents(9, 20)
    ]
    general = split_general(Documents(prose=tiny_documents(), chat=chat), TrainOptions(), model.base)
    gauges = Gauges.of(model, general, 4096, nullcontext)
    found = gauges.measure(model, resident)
    apart = {
        kind: Gauge.of(model, rows, 4096, nullcontext).measure(model, resident)
        for kind, rows in (("prose", general.watched), ("chat", general.chat_watched))
    }
    assert found["prose_rise"] == pytest.approx(apart["prose"]["general_rise"])
    assert found["chat_rise"] == pytest.approx(apart["chat"]["general_rise"])
    assert found["chat_nats"] == pytest.approx(apart["chat"]["general_nats"])
    assert found["chat_kl"] == pytest.approx(apart["chat"]["general_kl"])
    assert found["prose_rise"] != pytest.approx(found["chat_rise"])
    assert found["general_rise"] == max(found["prose_rise"], found["chat_rise"])
    assert found["general_nats"] == pytest.approx(apart["prose"]["general_nats"])
    alone = Gauges.of(model, split_general(Documents(chat=chat), TrainOptions(), model.base), 4096, nullcontext)
    assert alone.measure(model, resident)["general_rise"] == pytest.approx(found["chat_rise"])
