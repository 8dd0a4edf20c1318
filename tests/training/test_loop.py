"""The training loop: gradients do not depend on the split, a killed run resumes to the same bytes, full works."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from tiny import options_of, tiny_model, tiny_samples

from postil.adapter import AdaptedModel, LoraConfig, attach, detach
from postil.base import live_digest
from postil.data import Sample
from postil.data.packs import PACKING
from postil.errors import DataError, RecipeError, RunError
from postil.kernels.layout import Layout, Span, Spans
from postil.training import TrainOptions, train
from postil.training.defaults import settled
from postil.training.general import split_general
from postil.training.holding import BaseStates, kl_gradients
from postil.training.loop import AdapterWeights, _gradients, _steps, run, to_device, validate
from postil.training.optimizer import rate_at


def adapter_bytes(model: AdaptedModel) -> bytes:
    return model.resident("default").flat.numpy().tobytes()


def test_training_lowers_the_loss_and_leaves_the_base(model: AdaptedModel, samples: list[Sample]) -> None:
    before = live_digest(model.model)
    events: list[dict[str, float]] = []
    adapter = train(model, samples, learning_rate=2e-2, epochs=12, schedule="constant", watch=events.append)
    assert adapter is not None
    assert events[-1]["loss"] < events[0]["loss"] - 0.3
    assert live_digest(detach(model).model) == before


DROPPING = LoraConfig(r=4, dropout=0.3, target_modules=("q_proj", "k_proj", "down_proj", "lm_head"))


@pytest.mark.parametrize("config", [LoraConfig(r=4), DROPPING])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_gives_the_same_gradient(accumulation: int, config: LoraConfig, samples: list[Sample]) -> None:
    gradients = []
    for count in (1, accumulation):
        model = tiny_model()
        attach(model, config, seed=1)
        resident = model.resident("default")
        weights = AdapterWeights.of(resident)
        options = options_of(accumulation=count)
        _, packs = next(_steps(samples, options, 0, 1))
        assert len(packs) == count
        _gradients(model, weights, resident, packs, options, 1)
        gradients.append(weights.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


def test_one_sequence_at_a_time_has_the_masks_of_the_pack(samples: list[Sample]) -> None:
    """As for architectures that cannot be packed."""
    gradients = []
    for packs_well in (True, False):
        model = tiny_model()
        attach(model, DROPPING, seed=1)
        model.packs = packs_well
        weights, options = AdapterWeights.of(model.resident("default")), TrainOptions(batch_size=8)
        _, packs = next(_steps(samples, options, 0, 1))
        _gradients(model, weights, model.resident("default"), packs, options, 1)
        gradients.append(weights.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_step_draws_its_own_masks(dropout: float, held: bool, samples: list[Sample]) -> None:
    """The same rows and the same weights at two steps: the gradient is another where there is dropout, and only
    there; so is that of the text compared with the base."""
    model = tiny_model()
    attach(model, LoraConfig(r=4, dropout=dropout), seed=1)
    resident = model.resident("default")
    weights, options = AdapterWeights.of(resident), settled(TrainOptions(kl_weight=1.0), samples)[0]
    resident.flat.add_(torch.randn(resident.flat.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    _, packs = next(_steps(samples, options, 0, 1))
    gradients = []
    for step in (1, 2, 1):
        weights.grad.zero_()
        if held:
            kl_gradients(model, weights, resident, {"prose": samples[:8]}, options, step, BaseStates(nullcontext))
        else:
            _gradients(model, weights, resident, packs, options, step)
        gradients.append(weights.grad.clone())
    assert gradients[0].abs().max() > 0
    assert torch.equal(gradients[0], gradients[2])
    assert torch.equal(gradients[0], gradients[1]) == (not dropout)


def test_packed_gives_the_gradient_of_each_alone(samples: list[Sample]) -> None:
    model = tiny_model()
    attach(model, LoraConfig(r=4), seed=1)
    resident = model.resident("default")
    weights = AdapterWeights.of(resident)
    options = options_of()
    _, (pack,) = next(_steps(samples, options, 0, 1))
    _gradients(model, weights, resident, [pack], options, 1)
    packed = weights.grad.clone()
    weights.grad.zero_()
    ids, positions, share = to_device(pack, model)
    start, count = 0, float((pack.weights > 0).sum())
    for length in pack.lengths:
        rows = slice(start, start + length)
        with model.using(Layout.packed([length], Spans((Span(0, length, resident.slot),)))):
            model.loss(ids[rows], positions[rows], share[rows] / count)[0].backward()
        start += length
    torch.testing.assert_close(packed, weights.grad, rtol=1e-4, atol=1e-7)


def test_many_residents_change_nothing(samples: list[Sample]) -> None:
    results = []
    for others in (0, 3):
        model = tiny_model()
        for index in range(others):
            attach(model, LoraConfig(r=index + 1), name=f"other{index}", seed=9)
        attach(model, LoraConfig(r=4), seed=1)
        train(model, samples, epochs=2)
        results.append(adapter_bytes(model))
    assert results[0] == results[1]


def test_checkpointing_changes_nothing(samples: list[Sample]) -> None:
    results = []
    for checkpointing in (False, True):
        model = tiny_model()
        attach(model, LoraConfig(r=4, dropout=0.2), seed=1)
        train(model, samples, epochs=1, gradient_checkpointing=checkpointing)
        results.append(model.resident("default").flat.clone())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


KILLED = """
import os, sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from tiny import options_of, tiny_model, tiny_samples
from postil.adapter import LoraConfig, attach
from postil.training import train
model = tiny_model()
attach(model, LoraConfig(r=4, dropout=0.1, target_modules="all-linear"), seed=1)
print("ready", flush=True)
train(model, tiny_samples(), out={out!r}, valid=tiny_samples(5, 3), epochs=8, accumulation=2, checkpoint_every=2,
      valid_every=4, patience=0, watch=lambda event: print(event["step"], flush=True))
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


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    whole = run_script(tmp_path / "whole")
    assert whole is not None
    for kill_after, delay in (("3", 0.0), ("9", 0.003), ("16", 0.001)):
        run_script(tmp_path / "broken", kill_after, delay)
    assert run_script(tmp_path / "broken") == whole
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken/log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 25))


def test_a_checkpoint_of_another_recipe_is_refused(
    model: AdaptedModel, samples: list[Sample], tmp_path: Path
) -> None:
    train(model, samples, out=tmp_path, steps=2)
    with pytest.raises(RunError, match="another recipe, base or data"):
        train(model, samples, out=tmp_path, steps=2, learning_rate=1e-3)


def change_manifest(run: Path, **values: Any) -> None:
    file = run / "checkpoints/step-00000002/manifest.json"
    manifest = json.loads(file.read_text())
    machine = manifest["machine"] | values.pop("machine", {})
    file.write_text(json.dumps(manifest | {"machine": machine} | values))


def continued(samples: list[Sample], out: Path) -> list[str]:
    """What a run of two steps tells when it goes on."""
    told: list[str] = []
    model = tiny_model()
    attach(model, LoraConfig(r=4), seed=1)
    run(model, samples, [], out=out, name="default", options=TrainOptions(steps=2), tell=told.append)
    return told


def test_a_run_that_goes_on_elsewhere_says_what_is_other(samples: list[Sample], tmp_path: Path) -> None:
    assert continued(samples, tmp_path) == []
    assert continued(samples, tmp_path) == ["going on from step 2"]
    change_manifest(tmp_path, machine={"device": "cuda", "GPU": "NVIDIA L4", "postil": "0.0.1"})
    first, second = continued(samples, tmp_path)
    assert first == (
        "the run continues on another machine or version (device: cuda there, cpu here, GPU: NVIDIA L4 there, None "
        f"here, postil: 0.0.1 there, {version('postil')} here): its bytes will differ from an unbroken run's"
    )
    assert second == "going on from step 2"


@pytest.mark.parametrize("packing", [None, PACKING + 1])
def test_a_run_of_another_packing_is_not_gone_on_with(
    packing: int | None, samples: list[Sample], tmp_path: Path
) -> None:
    continued(samples, tmp_path)
    change_manifest(tmp_path, packing=packing, machine={"postil": "0.0.1"})
    with pytest.raises(RunError, match=r"made by postil 0.0.1, which dealt the rows out otherwise than .* --out"):
        continued(samples, tmp_path)


def test_packing_keeps_its_number_as_long_as_steps_hold_the_same() -> None:
    options = options_of(batch_size=5, accumulation=2, pack_tokens=24, general_share=0.4, general_tokens=12)
    general = split_general(tiny_samples(9, seed=2), options, tiny_model().base)
    digest = hashlib.sha256()
    for step, packs in _steps(tiny_samples(), options, 0, 10, general):
        for each in packs:
            digest.update(repr((step, each.rows, each.lengths)).encode() + each.ids.tobytes())
    assert (PACKING, digest.hexdigest()[:16]) == (1, "f5f4db94c5641d60")  # other steps: raise PACKING


def test_a_loss_that_is_not_finite_stops_the_run(model: AdaptedModel, samples: list[Sample]) -> None:
    model.resident("default").flat.fill_(float("inf"))
    with pytest.raises(RunError, match="at step 1; lower the learning rate"):
        train(model, samples, steps=2)


def test_no_samples_is_an_error(model: AdaptedModel) -> None:
    with pytest.raises(DataError, match="no sample to train on"):
        train(model, [])


def test_the_best_validation_state_is_kept(samples: list[Sample]) -> None:
    model = tiny_model()
    attach(model, LoraConfig(r=4), seed=1)
    held_out = tiny_samples(6, seed=5)
    events: list[dict[str, float]] = []
    train(model, samples, valid=held_out, learning_rate=5e-2, epochs=10, valid_every=1, watch=events.append)
    best = min(event["valid_loss"] for event in events)
    assert best < events[-1]["valid_loss"]  # random targets: it over-fits, so the last is not the best
    assert validate(model, held_out, model.resident("default"), 4096) == pytest.approx(best, abs=1e-6)


def test_full_fine_tuning_trains_every_weight(samples: list[Sample]) -> None:
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.model.named_parameters()}
    events: list[dict[str, float]] = []
    train(model, samples, method="full", learning_rate=3e-3, epochs=6, watch=events.append)
    assert events[-1]["loss"] < events[0]["loss"] - 0.3
    assert all(not torch.equal(before[name], parameter) for name, parameter in model.model.named_parameters())
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_the_schedule() -> None:
    options = options_of(learning_rate=1.0, warmup=4, schedule="linear")
    rates = [rate_at(step, options, 12) for step in range(1, 13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    cosine = options_of(learning_rate=1.0, warmup=4)
    assert rate_at(5, cosine, 12) == pytest.approx(1.0)
    assert 0 < rate_at(12, cosine, 12) < 0.1


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("total", [1, 2, 10, 21, 100, 1000])
def test_a_run_of_any_length_reaches_and_leaves_its_peak(total: int, schedule: str) -> None:
    options = options_of(learning_rate=1.0, schedule=schedule)
    rates = [rate_at(step, options, total) for step in range(1, total + 1)]
    top = rates.index(max(rates))
    assert max(rates) == 1.0
    assert top < max(1, 0.1 * total)
    assert top + 1 <= 20
    assert total == 1 or rates[-1] < (0.6 if total == 2 else 0.2)
    assert all(one <= other for one, other in pairwise(rates[: top + 1]))
    assert all(one >= other for one, other in pairwise(rates[top:]))


@pytest.mark.parametrize(
    ("warmup", "total", "steps"),
    [
        (0, 10, 0),
        (0.05, 1000, 20),
        (0.05, 100, 5),
        (0.03, 1000, 20),
        (0.9, 10, 4),
        (0.9, 1, 0),
        (4, 12, 4),
        (20, 10, 9),
    ],
)
def test_warm_up_is_a_share_or_steps(warmup: float, total: int, steps: int) -> None:
    assert options_of(warmup=warmup).warmup_steps(total) == steps


def test_a_warm_up_of_one_and_a_half_steps_is_refused() -> None:
    assert options_of(warmup=2.0).warmup_steps(100) == 2
    with pytest.raises(RecipeError, match=r"warmup: a share of the steps below 1, or a whole number of steps"):
        TrainOptions(warmup=1.5)


def test_ctrl_c_saves_and_is_raised(model: AdaptedModel, samples: list[Sample], tmp_path: Path) -> None:
    def interrupt(event: dict[str, float]) -> None:
        if event["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(model, samples, out=tmp_path, epochs=10, checkpoint_every=100, watch=interrupt)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert not model.resident("default").trainable


@pytest.mark.parametrize("change", [{"alpha": 64}, {"use_rslora": True}, {"seed": 2}])
def test_the_api_resumes_only_its_own_run(change: dict[str, int], samples: list[Sample], tmp_path: Path) -> None:
    for number, extra in enumerate(({}, change)):
        model = tiny_model()
        settings = {"r": 4} | {key: value for key, value in extra.items() if key != "seed"}
        attach(model, LoraConfig(**settings), seed=extra.get("seed", 1))
        if number:
            with pytest.raises(RunError, match="another recipe, base or data"):
                train(model, samples, out=tmp_path, steps=2)
        else:
            train(model, samples, out=tmp_path, steps=2)


def test_a_gradient_that_is_not_finite_reaches_no_weight(model: AdaptedModel, samples: list[Sample]) -> None:
    resident = model.resident("default")
    before = resident.flat.clone()
    leaf = next(iter(resident.leaves.values()))
    leaf.requires_grad_(True).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(RunError, match=r"gradient norm (inf|nan) at step 1"):
        train(model, samples, steps=1)
    assert torch.equal(resident.flat, before)


def test_old_checkpoints_go_and_other_directories_stay(
    model: AdaptedModel, samples: list[Sample], tmp_path: Path
) -> None:
    other = tmp_path / "checkpoints/step-100"
    other.mkdir(parents=True)
    (other / "mine").touch()
    train(model, samples, out=tmp_path, epochs=2, checkpoint_every=1, keep_checkpoints=2)
    assert sorted(path.name for path in other.parent.iterdir()) == ["step-00000005", "step-00000006", "step-100"]
    assert (other / "mine").exists()


def test_a_checkpoint_that_is_not_whole_is_set_aside(samples: list[Sample], tmp_path: Path) -> None:
    def trained() -> torch.Tensor:
        model = tiny_model()
        attach(model, LoraConfig(r=4), seed=1)
        train(model, samples, out=tmp_path, epochs=2, checkpoint_every=1)
        return model.resident("default").flat.detach().clone()

    before = trained()
    places = tmp_path / "checkpoints"
    (places / "step-00000006/manifest.json").unlink()
    assert torch.equal(trained(), before)
    assert {path.name for path in places.iterdir()} == {"step-00000005", "step-00000006", "step-00000006.damaged-1"}


def test_a_file_in_a_checkpoint_stays_and_stops_nothing(
    model: AdaptedModel, samples: list[Sample], tmp_path: Path
) -> None:
    def drop_in(event: dict[str, Any]) -> None:
        if event["step"] == 3:
            (tmp_path / "checkpoints/step-00000002/mine").touch()

    train(model, samples, out=tmp_path, epochs=2, checkpoint_every=1, watch=drop_in)
    assert [path.name for path in (tmp_path / "checkpoints/step-00000002").iterdir()] == ["mine"]


def test_two_processes_do_not_share_a_run(model: AdaptedModel, samples: list[Sample], tmp_path: Path) -> None:
    with filelock.FileLock(tmp_path / ".lock"), pytest.raises(RunError, match="another process is training in"):
        train(model, samples, out=tmp_path, steps=1)


def test_patience_needs_held_out_rows(model: AdaptedModel, samples: list[Sample]) -> None:
    with pytest.raises(RecipeError, match="patience needs held-out rows"):
        train(model, samples, patience=2)


def test_early_stop(samples: list[Sample], tmp_path: Path) -> None:
    steps = []
    for _ in range(2):  # the second time there is nothing left to do
        model = tiny_model()
        attach(model, LoraConfig(r=4), seed=1)
        events: list[dict[str, float]] = []
        train(model, samples, valid=tiny_samples(6, seed=5), out=tmp_path, learning_rate=5e-2, epochs=30,
              valid_every=1, patience=3, watch=events.append)  # fmt: skip
        steps.append(len(events))
    assert 3 < steps[0] < 90
    assert steps[1] == 0


def test_a_failed_full_run_leaves_the_base_frozen(samples: list[Sample]) -> None:
    model = tiny_model()

    def fail(_event: dict[str, float]) -> None:
        raise ValueError("from the watcher")

    with pytest.raises(ValueError, match="from the watcher"):
        train(model, samples, method="full", steps=1, watch=fail)
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
