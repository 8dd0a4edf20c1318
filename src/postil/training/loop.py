"""The training loop: packs in, one update a step, validation, checkpoints, an adapter (or a model) out."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from postil.adapter.adapter import Adapter
from postil.adapter.bank import Resident
from postil.adapter.divergence import Bare
from postil.adapter.model import AdaptedModel
from postil.base import Base
from postil.data import Dataset, Pack, Sample, epoch_steps
from postil.errors import AdapterError, DataError, RecipeError, RunError, listed
from postil.kernels.layout import Layout
from postil.seeds import derive
from postil.training.batch import shares, spans_of, to_device
from postil.training.card import card_of, recipe_of
from postil.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from postil.training.defaults import settled
from postil.training.directory import only_trainer
from postil.training.general import General, check_general, kl_gradients, split_general
from postil.training.guard import Gauge, Guarded, keep
from postil.training.log import RunLog
from postil.training.optimizer import AdamW, AdapterWeights, FullWeights, Trainable
from postil.training.options import Settled, TrainOptions
from postil.training.validation import measured, tokens_of, validate

SCALE_FACTOR = 16.0  # the sum of a step's losses is scaled by no more than 1 and no less than LEAST_SCALE …
LEAST_SCALE = SCALE_FACTOR**-6
SCALE_STEPS = 100  # … and every so many steps a scale below 1 rises again
Watcher = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended: steps done, the last training loss and best validation loss (nats per target token), what a
    guard did, the step that it began or went on from, and its options with all that was chosen."""

    steps: int
    total_steps: int
    loss: float
    valid_loss: float | None
    best_step: int
    stopped: bool
    options: Settled
    guarded: Guarded | None = None
    begun: int = 0


def train(
    model: AdaptedModel,
    data: Dataset | Sequence[Sample],
    *,
    out: str | Path | None = None,
    valid: Dataset | Sequence[Sample] | None = None,
    general: Dataset | Sequence[Sample] | None = None,
    name: str = "default",
    options: TrainOptions | None = None,
    watch: Watcher | None = None,
    **settings: Any,
) -> Adapter | None:
    """Train the resident adapter `name` (or, with method="full", every weight of the base); returns the adapter.

    out: the run directory (log.jsonl, TensorBoard, checkpoints; resumed where it holds a checkpoint of the
    same options, data, base and starting values). valid: held-out samples; the best state is kept. general:
    documents of general text, watched and held to as the options say (guard, kl_weight, general_share).
    settings: fields of TrainOptions. `watch` is called with {"step", "loss", …} after every update. Raises
    RunError when loss or gradient is not finite, a checkpoint is another run's or no state stays within the guard
    (the model then holds the untouched one), AdapterError when a module gets no gradient; after Ctrl-C it saves
    and raises KeyboardInterrupt.
    """
    options = options or TrainOptions(**settings)
    outcome = run(
        model, _samples(data), _samples(valid), general=_samples(general), out=out, name=name, options=options,
        watch=watch,
    )  # fmt: skip
    if outcome.stopped:
        raise KeyboardInterrupt
    refuse_untouched(outcome)
    if options.method == "full":
        return None
    model.resident(name).card = card_of(
        recipe_of(model, name, data, outcome.options), outcome, data, samples=len(_samples(data)), held_out=valid,
        held_out_samples=len(_samples(valid)), general=general,
    )  # fmt: skip
    return model.export(name)


def refuse_untouched(outcome: Outcome) -> None:
    """Raise RunError where the guard left only the state of step 0: nothing was learned that may be kept."""
    if outcome.guarded is not None and outcome.guarded.step == 0:
        raise RunError(outcome.guarded.sentence())


def run(
    model: AdaptedModel,
    samples: list[Sample],
    valid: list[Sample],
    *,
    out: str | Path | None,
    name: str,
    options: TrainOptions,
    general: Sequence[Sample] = (),
    watch: Watcher | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """The loop itself; see `train`. The model ends with the best state (the last where nothing is held out or
    guarded; the untouched one where none stays within the guard).

    `tell` gets what the user should know, as it comes up: a resumed step, idle experts, what the guard cost.
    """
    if not samples:
        raise DataError("there is no sample to train on; look at the data with `postil data show`")
    check_form(model.base, options)
    if options.patience and not valid and options.guard is None:
        raise RecipeError("training.patience needs held-out rows: give valid, or a valid_share above 0")
    check_general(options, bool(general))
    beside = split_general(general, options, model.base) if general else None
    now, _ = settled(options, samples, valid, tokens_of(beside.watched) if beside is not None else 0)
    valid = measured(valid, now.valid_rows)
    directory = Path(out) if out is not None else None
    resident = model.resident(name) if options.method != "full" else None
    weights: Trainable = AdapterWeights.of(resident) if resident else FullWeights.of(model.model)
    model.checkpointing = options.gradient_checkpointing
    if resident is not None:
        resident.card = {}
    try:
        with only_trainer(directory):
            return _train(model, samples, valid, beside, directory, resident, weights, now, watch, tell)
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
    general: General | None,
    directory: Path | None,
    resident: Resident | None,
    weights: Trainable,
    options: Settled,
    watch: Watcher | None,
    tell: Callable[[str], None],
) -> Outcome:
    total = options.total_steps(len(samples))
    optimizer = AdamW.of(weights, options, total)
    bare: Bare = weights.origin() if general is not None else nullcontext
    untouched = weights.flat.detach().clone() if options.guard is not None else None
    progress, identity = Progress(), ""
    if directory is not None:
        identity = identity_of(model, samples, valid, resident, weights, options, general)
        progress, notes = load_checkpoint(directory, optimizer, identity)
        for line in notes:
            tell(line)
    if progress.best is None:
        progress.best = untouched  # step 0 passes any guard
    del untouched
    begun = progress.step
    gauge = Gauge.of(model, general.watched, options.pack_tokens, bare) if general is not None else None
    save_every = options.checkpoint_every or max(total // 10, 1)
    loss, stopped = float("nan"), False
    late = 0 < options.patience <= progress.since_best  # it stopped early before
    with ExitStack() as stack:
        log = stack.enter_context(RunLog(directory, progress.step)) if directory is not None else None
        stop = stack.enter_context(_polite_stop())
        watching = log.total("watch_seconds") if log is not None else 0.0
        last, share = progress.step if late else total, shares(model, resident)
        for step, packs in _steps(samples, options, progress.step, last, general, share):
            started = time.perf_counter()
            while True:
                loss, tokens, targets = _gradients(model, weights, resident, packs, options, step, progress.scale)
                held = _held(model, weights, resident, general, options, step, bare, progress.scale)
                norm = optimizer.clip()
                if math.isfinite(norm) or not _overflowed(model, progress, loss):
                    break
                weights.grad.zero_()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                wider = "open the base in bfloat16 or float32 (dtype), " if _in_float16(model) else ""
                rows = listed(row for pack in packs for row, _ in pack.sizes if row)
                raise RunError(
                    f"loss {loss}, gradient norm {norm} at step {step}; lower the learning rate "
                    f"({options.learning_rate:g}), {wider}or look at rows {rows}; "
                    "checkpoints before this step are kept"
                )
            if step == 1 and resident is not None:
                for line in _check_gradients(resident):
                    tell(line)
            rate = optimizer.update()
            progress.step = step
            progress.scale = _risen(progress.scale, step)
            seconds = time.perf_counter() - started
            event = {"loss": loss, "learning_rate": rate, "gradient_norm": norm, "tokens": tokens,
                     "target_tokens": targets, "seconds": round(seconds, 4), **held}  # fmt: skip
            if step % options.valid_every == 0 or step == total:
                if gauge is not None:
                    event |= gauge.measure(model, resident)
                    watching += event["watch_seconds"]
                if valid:
                    event["valid_loss"] = validate(model, valid, resident, options.pack_tokens)
                if valid or options.guard is not None:
                    keep(progress, weights, options, event.get("valid_loss"), event.get("general_rise"))
            if log is not None:
                log.write(step, **event)
            if watch is not None:
                watch({"step": step, "total_steps": total, **event})
            stopped = stop.is_set()
            late = 0 < options.patience <= progress.since_best
            if directory is not None and (step % save_every == 0 or step == total or stopped or late):
                save_checkpoint(directory, optimizer, progress, identity, options.keep_checkpoints)
            if late and step < total:
                tell(
                    f"stopped early at step {step} of {total}: {progress.since_best} validations without gain "
                    "(training.patience)"
                )
            if stopped or late:
                break
    if progress.best is not None and not stopped:
        with torch.no_grad():
            weights.flat.copy_(progress.best)
        weights.publish()
    guarded = None
    if gauge is not None and options.guard is not None and not stopped:
        guarded = gauge.verdict(model, resident, progress, options.guard, watching)
        if guarded.step:
            tell(guarded.sentence())
    return Outcome(
        progress.step, total, loss, progress.best_loss, progress.best_step, stopped, options, guarded, begun
    )


def check_form(base: Base, options: TrainOptions) -> None:
    """Raise RecipeError where the base's form is not the method's."""
    if options.method == "full" and base.quantised:
        raise RecipeError("training.method full changes every weight, and 4-bit weights cannot be: take a dense base")
    if options.method == "qlora" and not base.quantised:
        raise RecipeError('training.method qlora needs a 4-bit base: open it with quant="nf4", or use method lora')


def seconds_per_run(
    model: AdaptedModel, samples: list[Sample], name: str, options: TrainOptions, documents: Sequence[Sample] = ()
) -> float:
    """About how long a run takes: the gradients of its first step, timed the second time; nothing is changed.

    Validating, and watching the general text of `documents`, comes on top.
    """
    resident = model.resident(name) if options.method != "full" else None
    weights: Trainable = AdapterWeights.of(resident) if resident else FullWeights.of(model.model)
    general = split_general(documents, options, model.base) if documents else None
    options, _ = settled(options, samples)
    bare: Bare = weights.origin() if general is not None else nullcontext
    _, packs = next(_steps(samples, options, 0, 1, general, shares(model, resident)))
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        _gradients(model, weights, resident, packs, options, 1)
        _held(model, weights, resident, general, options, 1, bare)
        seconds = time.perf_counter() - began
    if resident is not None:
        resident.train(False)
    else:
        model.model.requires_grad_(False)
    tokens = sum(size for pack in packs for row, size in pack.sizes if row)
    epoch = math.ceil(len(samples) / options.batch_size)
    total = tokens_of(samples) * options.total_steps(len(samples)) / epoch
    return seconds * total / max(tokens, 1)


def identity_of(
    model: AdaptedModel,
    samples: Sequence[Sample],
    valid: Sequence[Sample],
    resident: Resident | None,
    weights: Trainable,
    options: TrainOptions,
    general: General | None = None,
) -> str:
    """What a checkpoint must share with the run that resumes from it: options, data, base, adapter, first values."""
    form = f"{model.base.fingerprint()} {model.base.dtype}" if model.base.quantised else str(model.base.fingerprint())
    digest = hashlib.sha256(form.encode())
    fields = [options.model_dump(mode="json", exclude={"keep_checkpoints", "checkpoint_every"})]
    if resident is not None:
        fields.append(resident.config.model_dump(mode="json"))
    digest.update(json.dumps(fields, sort_keys=True).encode())
    for kind in (samples, valid, *((general.watched, general.held) if general is not None else ())):
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
    samples: Sequence[Sample],
    options: Settled,
    done: int,
    total: int,
    general: General | None = None,
    share: bool = False,
) -> Iterator[tuple[int, list[Pack]]]:
    """(step number from 1, its packs) for the steps after `done`: a pure function of data, seed and epoch."""

    def beside(epoch: int, index: int) -> list[Sample]:
        return general.mixed(options, epoch * per_epoch + index + 1) if general is not None else []

    per_epoch = math.ceil(len(samples) / options.batch_size)
    for epoch in range(done // per_epoch, math.ceil(total / per_epoch)):
        steps = epoch_steps(
            samples, batch_size=options.batch_size, accumulation=options.accumulation,
            pack_tokens=options.pack_tokens, seed=options.seed, epoch=epoch, beside=partial(beside, epoch),
            share=share,
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
    scale: float = 1.0,
) -> tuple[float, int, int]:
    """One step's gradients, where there were none: losses summed over its packs, divided by its target tokens.

    The backward pass is the sum's (times `scale`), and the division that of float32's flat gradient: in float16 a
    token's share of the mean is lost, for its least number is 6e-8.
    """
    targets = sum(int((pack.weights > 0).sum()) for pack in packs)
    loss = 0.0
    for index, pack in enumerate(packs):
        seed = derive(options.seed, "dropout", step, index)
        ids, positions, share = to_device(pack, model)
        layout = Layout.packed(pack.lengths, spans_of(resident, len(pack.ids), seed), pack.before)
        with model.using(layout):
            total, _, _ = model.loss(ids, positions, share * scale)
            if total.requires_grad:
                total.backward()  # type: ignore[no-untyped-call]
        weights.collect()
        loss += float(total.detach())
    divisor = max(targets, 1) * scale
    weights.grad.div_(divisor)
    return loss / divisor, sum(size for pack in packs for _, size in pack.sizes), targets


def _held(
    model: AdaptedModel,
    weights: Trainable,
    resident: Resident | None,
    general: General | None,
    options: Settled,
    step: int,
    bare: Bare,
    scale: float = 1.0,
) -> dict[str, float]:
    """The part of a step's gradients that holds the model to its base: kl_loss (nats per token) and kl_seconds."""
    rows = general.compared(options, step) if general is not None else []
    if not rows:
        return {}
    began = time.perf_counter()
    mean = kl_gradients(model, weights, resident, rows, options, step, bare, scale)
    return {"kl_loss": mean, "kl_seconds": round(time.perf_counter() - began, 4)}


def _overflowed(model: AdaptedModel, progress: Progress, loss: float) -> bool:
    """Whether a gradient that is not finite may be float16's 65,504 alone: the sum is then scaled down further."""
    if not _in_float16(model) or not math.isfinite(loss) or progress.scale <= LEAST_SCALE:
        return False
    progress.scale /= SCALE_FACTOR
    return True


def _risen(scale: float, step: int) -> float:
    """The scale after step `step`: every SCALE_STEPS one below 1 is tried higher again."""
    return min(scale * SCALE_FACTOR, 1.0) if step % SCALE_STEPS == 0 else scale


def _in_float16(model: AdaptedModel) -> bool:
    return model.base.dtype == torch.float16


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
