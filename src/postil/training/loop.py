"""The training loop: packs in, one update a step, validation, checkpoints, an adapter (or a model) out."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch

from postil.adapter.adapter import Adapter
from postil.adapter.bank import Resident
from postil.adapter.model import AdaptedModel
from postil.data import Dataset, Pack, Sample, epoch_steps
from postil.errors import AdapterError, DataError, RecipeError, RunError, StorageError, listed
from postil.files import remove_leftovers
from postil.kernels.layout import Layout, Span, Spans
from postil.seeds import derive
from postil.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from postil.training.log import RunLog
from postil.training.optimizer import AdamW, AdapterWeights, FullWeights, Trainable
from postil.training.options import TrainOptions

Watcher = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: steps done, the last training loss and best validation loss (nats per target token)."""

    steps: int
    total_steps: int
    loss: float
    valid_loss: float | None
    best_step: int
    stopped: bool


def train(
    model: AdaptedModel,
    data: Dataset | Sequence[Sample],
    *,
    out: str | Path | None = None,
    valid: Dataset | Sequence[Sample] | None = None,
    name: str = "default",
    options: TrainOptions | None = None,
    watch: Watcher | None = None,
    **settings: Any,
) -> Adapter | None:
    """Train the resident adapter `name` (or, with method="full", every weight of the base); returns the adapter.

    out: the run directory (log.jsonl, TensorBoard, checkpoints; resumed where it holds a checkpoint of the
    same options, data, base and starting values). valid: held-out samples; the best state is kept. settings:
    fields of TrainOptions. `watch` is called with {"step", "loss", …} after every update. Raises RunError when
    loss or gradient is not finite or a checkpoint is another run's, AdapterError when a module gets no
    gradient; after Ctrl-C it saves and raises KeyboardInterrupt.
    """
    options = options or TrainOptions(**settings)
    outcome = run(model, _samples(data), _samples(valid), out=out, name=name, options=options, watch=watch)
    if outcome.stopped:
        raise KeyboardInterrupt
    return model.export(name) if options.method == "lora" else None


def run(
    model: AdaptedModel,
    samples: list[Sample],
    valid: list[Sample],
    *,
    out: str | Path | None,
    name: str,
    options: TrainOptions,
    watch: Watcher | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """The loop itself; see `train`. The model ends with the best state (the last where nothing is held out).

    `tell` gets what the user should know, as it comes up: a resumed step, another machine, idle experts.
    """
    if not samples:
        raise DataError("there is no sample to train on; look at the data with `postil data show`")
    if options.patience is not None and not valid:
        raise RecipeError("training.patience needs held-out rows: give valid, or a valid_share above 0")
    directory = Path(out) if out is not None else None
    resident = model.resident(name) if options.method == "lora" else None
    weights: Trainable = AdapterWeights.of(resident) if resident else FullWeights.of(model.model)
    model.checkpointing = options.gradient_checkpointing
    try:
        with _only_trainer(directory):
            return _train(model, samples, valid, directory, resident, weights, options, watch, tell)
    finally:
        model.checkpointing = False
        if resident is not None:
            resident.train(False)
        else:
            model.model.requires_grad_(False)
            model.base.changed()


def _train(
    model: AdaptedModel,
    samples: list[Sample],
    valid: list[Sample],
    directory: Path | None,
    resident: Resident | None,
    weights: Trainable,
    options: TrainOptions,
    watch: Watcher | None,
    tell: Callable[[str], None],
) -> Outcome:
    total = options.steps or math.ceil(len(samples) / options.batch_size) * options.epochs
    optimizer = AdamW.of(weights, options, total)
    progress, identity = Progress(), ""
    if directory is not None:
        identity = identity_of(model, samples, valid, resident, weights, options)
        progress, notes = load_checkpoint(directory, optimizer, identity)
        for line in notes:
            tell(line)
    valid_every = options.valid_every or max(total // 10, 1)
    save_every = options.checkpoint_every or max(total // 10, 1)
    loss, stopped = float("nan"), False
    late = options.patience is not None and progress.since_best >= options.patience  # it stopped early before
    with ExitStack() as stack:
        log = stack.enter_context(RunLog(directory, progress.step)) if directory is not None else None
        stop = stack.enter_context(_polite_stop())
        for step, packs in _steps(samples, options, progress.step, progress.step if late else total):
            started = time.perf_counter()
            loss, tokens, targets = _gradients(model, weights, resident, packs, options, step)
            norm = optimizer.clip()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise RunError(
                    f"loss {loss}, gradient norm {norm} at step {step}; lower the learning rate ({options.rate:g}) "
                    f"or look at rows {listed(row for pack in packs for row in pack.rows)}; "
                    "checkpoints before this step are kept"
                )
            if step == 1 and resident is not None:
                for line in _check_gradients(resident):
                    tell(line)
            rate = optimizer.update()
            progress.step = step
            seconds = time.perf_counter() - started
            event = {"loss": loss, "learning_rate": rate, "gradient_norm": norm, "tokens": tokens,
                     "target_tokens": targets, "seconds": round(seconds, 4)}  # fmt: skip
            if valid and (step % valid_every == 0 or step == total):
                event["valid_loss"] = validate(model, valid, resident, options.pack_tokens)
                _keep_best(progress, event["valid_loss"], step, weights)
            if log is not None:
                log.write(step, **event)
            if watch is not None:
                watch({"step": step, "total_steps": total, **event})
            stopped = stop.is_set()
            late = options.patience is not None and progress.since_best >= options.patience
            if directory is not None and (step % save_every == 0 or step == total or stopped or late):
                save_checkpoint(directory, optimizer, progress, identity, options.keep_checkpoints)
            if stopped or late:
                break
    if progress.best is not None and not stopped:
        with torch.no_grad():
            weights.flat.copy_(progress.best)
        weights.publish()
    return Outcome(progress.step, total, loss, progress.best_loss, progress.best_step, stopped)


@contextmanager
def _only_trainer(directory: Path | None) -> Iterator[None]:
    """One process at a time trains in a run directory; what killed ones left there is removed."""
    if directory is None:
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{directory} could not be made ({error.strerror}); choose another --out") from error
    try:
        with filelock.FileLock(directory / ".lock", timeout=0):
            remove_leftovers(directory)
            yield
    except filelock.Timeout:
        raise RunError(f"another process is training in {directory}; wait for it or choose another --out") from None


def seconds_per_run(model: AdaptedModel, samples: list[Sample], name: str, options: TrainOptions) -> float:
    """About how long a run takes: the gradients of its first step, timed the second time; nothing is changed."""
    resident = model.resident(name) if options.method == "lora" else None
    weights: Trainable = AdapterWeights.of(resident) if resident else FullWeights.of(model.model)
    _, packs = next(_steps(samples, options, 0, 1))
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        _gradients(model, weights, resident, packs, options, 1)
        seconds = time.perf_counter() - began
    if resident is not None:
        resident.train(False)
    else:
        model.model.requires_grad_(False)
    tokens = sum(len(pack.ids) for pack in packs)
    total = sum(len(sample.ids) for sample in samples) * options.epochs
    if options.steps is not None:
        total = total * options.steps // (math.ceil(len(samples) / options.batch_size) * options.epochs)
    return seconds * total / max(tokens, 1)


def identity_of(
    model: AdaptedModel,
    samples: Sequence[Sample],
    valid: Sequence[Sample],
    resident: Resident | None,
    weights: Trainable,
    options: TrainOptions,
) -> str:
    """What a checkpoint must share with the run that resumes from it: options, data, base, adapter, first values."""
    digest = hashlib.sha256(str(model.base.fingerprint()).encode())
    fields = [options.model_dump(mode="json", exclude={"keep_checkpoints", "checkpoint_every"})]
    if resident is not None:
        fields.append(resident.config.model_dump(mode="json"))
    digest.update(json.dumps(fields, sort_keys=True).encode())
    for kind in (samples, valid):
        digest.update(len(kind).to_bytes(8, "big"))
        for sample in kind:
            digest.update(len(sample.ids).to_bytes(8, "big"))
            digest.update(sample.ids.tobytes() + sample.weights.tobytes())
    digest.update(weights.flat.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _samples(data: Dataset | Sequence[Sample] | None) -> list[Sample]:
    if data is None:
        return []
    return list(data.samples if isinstance(data, Dataset) else data)


def _steps(
    samples: Sequence[Sample], options: TrainOptions, done: int, total: int
) -> Iterator[tuple[int, list[Pack]]]:
    """(step number from 1, its packs) for the steps after `done`: a pure function of data, seed and epoch."""
    per_epoch = math.ceil(len(samples) / options.batch_size)
    for epoch in range(done // per_epoch, math.ceil(total / per_epoch)):
        steps = epoch_steps(
            samples, batch_size=options.batch_size, accumulation=options.accumulation,
            pack_tokens=options.pack_tokens, seed=options.seed, epoch=epoch,
        )  # fmt: skip
        for index, packs in enumerate(steps):
            step = epoch * per_epoch + index + 1
            if done < step <= total:
                yield step, packs


def _gradients(
    model: AdaptedModel,
    weights: Trainable,
    resident: Resident | None,
    packs: Sequence[Pack],
    options: TrainOptions,
    step: int,
) -> tuple[float, int, int]:
    """One step's gradients: losses summed over its packs, divided by the target tokens of the whole step."""
    targets = sum(int((pack.weights > 0).sum()) for pack in packs)
    loss = 0.0
    for index, pack in enumerate(packs):
        seed = derive(options.seed, "dropout", step, index)
        ids, positions, share = to_device(pack, model)
        layout = Layout.packed(pack.lengths, _spans(resident, len(pack.ids), seed))
        with model.using(layout):
            total, _, _ = model.loss(ids, positions, share / max(targets, 1))
            if total.requires_grad:
                total.backward()  # type: ignore[no-untyped-call]
        weights.collect()
        loss += float(total.detach())
    return loss, sum(len(pack.ids) for pack in packs), targets


def to_device(pack: Pack, model: AdaptedModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids, positions, loss weights) of a pack as tensors on the model's device."""
    device = model.base.device
    return (
        torch.from_numpy(pack.ids).to(device),
        torch.from_numpy(pack.positions).to(device),
        torch.from_numpy(pack.weights).to(device),
    )


def _spans(resident: Resident | None, tokens: int, seed: int = 0) -> Spans:
    return Spans((Span(0, tokens, resident.slot, 1.0, seed),)) if resident is not None else Spans()


@torch.no_grad()
def validate(model: AdaptedModel, samples: Sequence[Sample], resident: Resident | None, pack_tokens: int) -> float:
    """Mean nats per target token over held-out samples, dropout off."""
    total, count = 0.0, 0
    steps = epoch_steps(
        samples, batch_size=32, accumulation=1, pack_tokens=pack_tokens, seed=0, epoch=0, shuffle=False
    )
    for packs in steps:
        for pack in packs:
            ids, positions, weights = to_device(pack, model)
            with model.using(Layout.packed(pack.lengths, _spans(resident, len(pack.ids)))):
                part, _, targets = model.loss(ids, positions, weights)
            total += float(part)
            count += len(targets)
    return total / max(count, 1)


def _keep_best(progress: Progress, loss: float, step: int, weights: Trainable) -> None:
    if progress.best_loss is None or loss < progress.best_loss:
        progress.best_loss, progress.best_step, progress.since_best = loss, step, 0
        progress.best = weights.flat.detach().clone()
    else:
        progress.since_best += 1


def _check_gradients(resident: Resident) -> list[str]:
    """After the first backward pass every adapted module must have moved its B (B starts at zero, A does not).

    Experts that no token was sent to are no fault: they are named in the notes returned.
    """
    still, idle = list[str](), list[str]()
    for target in resident.targets:
        leaf = resident.leaves[f"{target.path}.b"]
        other = resident.leaves.get(f"{target.path}.a")
        moved = any(part is not None and part.grad is not None and bool(part.grad.any()) for part in (leaf, other))
        if not moved:
            (idle if "expert" in target.path else still).append(target.path)
    if still:
        raise AdapterError(
            f"{len(still)} of {len(resident.targets)} adapted modules got no gradient in the first step: "
            f"{listed(still)}; the model does not use them as expected, leave them out of target_modules"
        )
    return [f"{len(idle)} experts got no token in the first step: {listed(idle)}"] if idle else []


@contextmanager
def _polite_stop() -> Iterator[threading.Event]:
    """The first Ctrl-C finishes the step and saves; the second stops at once. Outside the main thread: neither."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(_number: int, _frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
