"""The training loop: packs in, one update a step, validation, checkpoints, an adapter (or a model) out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from postil.adapter.adapter import Adapter
from postil.adapter.bank import Resident
from postil.adapter.divergence import Bare
from postil.adapter.model import AdaptedModel
from postil.base import Base
from postil.data import Dataset, Sample
from postil.errors import DataError, RecipeError, RunError
from postil.training.batch import shares
from postil.training.card import card_of, digests_of, earlier_rows, recipe_of, rows_seen
from postil.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from postil.training.defaults import settled
from postil.training.directory import only_trainer
from postil.training.general import Documents, General, check_general, split_general
from postil.training.guard import Gauges, Guarded, keep
from postil.training.holding import BaseStates
from postil.training.identity import identity_of
from postil.training.interrupt import polite_stop
from postil.training.log import RunLog
from postil.training.optimizer import AdamW, AdapterWeights, FullWeights, Trainable
from postil.training.options import Settled, TrainOptions
from postil.training.step import gradients, hold, steps_of, take_step
from postil.training.validation import measured, tokens_of, validate

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
    general: Documents | Dataset | Sequence[Sample] | None = None,
    name: str = "default",
    options: TrainOptions | None = None,
    watch: Watcher | None = None,
    **settings: Any,
) -> Adapter | None:
    """Train the resident adapter `name` (or, with method="full", every weight of the base); returns the adapter.

    out: the run directory (log.jsonl, TensorBoard, checkpoints; resumed where it holds a checkpoint of the
    same options, data, base and starting values). valid: held-out samples; the best state is kept. general:
    documents of general text, or Documents of prose and chat (training.documents.general_documents), watched and
    held to as the options say (guard, kl_weight, general_share).
    settings: fields of TrainOptions. `watch` is called with {"step", "loss", …} after every update. Raises
    RunError when loss or gradient is not finite, a checkpoint is another run's or no state stays within the guard
    (the model then holds the untouched one), AdapterError when a module gets no gradient; after Ctrl-C it saves
    and raises KeyboardInterrupt.
    """
    options = options or TrainOptions(**settings)
    earlier = earlier_rows(model.resident(name)) if options.method != "full" else None
    outcome = run(
        model, _samples(data), _samples(valid), general=_documents(general), out=out, name=name, options=options,
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
        seen=rows_seen(digests_of(data), digests_of(valid), digests_of(general), earlier),
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
    general: Documents | Sequence[Sample] = (),
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
    check_general(options, len(general) > 0)
    beside = split_general(general, options, model.base) if len(general) else None
    now, _ = settled(options, samples, valid, beside)
    valid = measured(valid, now.valid_rows)
    directory = Path(out) if out is not None else None
    resident = model.resident(name) if options.method != "full" else None
    weights: Trainable = AdapterWeights.of(resident) if resident else FullWeights.of(model.model)
    if resident is not None:
        resident.card = {}
    try:
        with _learning(model, resident, options), only_trainer(directory):
            return _train(model, samples, valid, beside, directory, resident, weights, now, watch, tell)
    finally:
        if resident is None:
            model.base.changed()


@contextmanager
def _learning(model: AdaptedModel, resident: Resident | None, options: TrainOptions) -> Iterator[None]:
    """Recomputation as the options want it; afterwards nothing records a gradient, whatever happened."""
    model.checkpointing = options.gradient_checkpointing
    try:
        yield
    finally:
        model.checkpointing = False
        if resident is not None:
            resident.train(False)
        else:
            model.model.requires_grad_(False)


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
    """The run from where it stands to its end."""
    total = options.total_steps(len(samples))
    optimizer = AdamW.of(weights, options, total)
    bare: Bare = weights.origin() if general is not None else nullcontext
    identity = ""
    if directory is not None:
        identity = identity_of(model, samples, valid, resident, weights, options, general)
    progress = _begun(directory, optimizer, identity, tell)
    begun = progress.step
    held = general.all_held if general is not None and options.kl_weight else ()
    states = BaseStates(bare, held, options.pack_tokens) if held else None
    gauge = Gauges.of(model, general, options.pack_tokens, bare) if general is not None else None
    save_every = options.checkpoint_every or max(total // 10, 1)
    loss, stopped = float("nan"), False
    late = 0 < options.patience <= progress.since_best  # it stopped early before
    with ExitStack() as stack:
        log = stack.enter_context(RunLog(directory, progress.step)) if directory is not None else None
        stop = stack.enter_context(polite_stop())
        watching = log.total("watch_seconds") if log is not None else 0.0
        last, share = progress.step if late else total, shares(model, resident)
        for step, packs in steps_of(samples, options, progress.step, last, general, share):
            event = take_step(model, optimizer, resident, packs, general, states, progress, tell)
            loss = event["loss"]
            if step % options.valid_every == 0 or step == total:
                looked = gauge if options.guard is not None or step == total else None
                event |= _validated(model, valid, resident, looked, weights, options, progress)
                watching += event.get("watch_seconds", 0.0)
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
    guarded = None
    if not stopped:
        _put_back(progress, weights)
        if gauge is not None and options.guard is not None:
            guarded = gauge.verdict(model, resident, progress, options.guard, watching)
            if guarded.step:
                tell(guarded.sentence())
    return Outcome(
        progress.step, total, loss, progress.best_loss, progress.best_step, stopped, options, guarded, begun
    )


def _begun(directory: Path | None, optimizer: AdamW, identity: str, tell: Callable[[str], None]) -> Progress:
    """Where the run stands: at its newest checkpoint, or at the untouched state, which passes any guard."""
    guarded = optimizer.options.guard is not None
    untouched = optimizer.weights.flat.detach().clone() if guarded else None
    progress = Progress()
    if directory is not None:
        progress, notes = load_checkpoint(directory, optimizer, identity)
        for line in notes:
            tell(line)
    if progress.best is None:
        progress.best = untouched
    return progress


def _put_back(progress: Progress, weights: Trainable) -> None:
    """The best state into the model, where one was kept."""
    if progress.best is not None:
        with torch.no_grad():
            weights.flat.copy_(progress.best)
        weights.publish()


def _validated(
    model: AdaptedModel,
    valid: list[Sample],
    resident: Resident | None,
    gauge: Gauges | None,
    weights: Trainable,
    options: Settled,
    progress: Progress,
) -> dict[str, Any]:
    """What is measured of the state of now, which is kept where it is the best."""
    found: dict[str, Any] = gauge.measure(model, resident) if gauge is not None else {}
    if valid:
        found["valid_loss"] = validate(model, valid, resident, options.pack_tokens)
    if valid or options.guard is not None:
        keep(progress, weights, options, found.get("valid_loss"), found.get("general_rise"))
    return found


def check_form(base: Base, options: TrainOptions) -> None:
    """Raise RecipeError where the base's form is not the method's."""
    if options.method == "full" and base.quantised:
        raise RecipeError("training.method full changes every weight, and 4-bit weights cannot be: take a dense base")
    if options.method == "qlora" and not base.quantised:
        raise RecipeError('training.method qlora needs a 4-bit base: open it with quant="nf4", or use method lora')


def seconds_per_run(
    model: AdaptedModel,
    samples: list[Sample],
    name: str,
    options: TrainOptions,
    documents: Documents | Sequence[Sample] = (),
) -> float:
    """About how long a run takes: the gradients of its first step, timed the second time; nothing is changed.

    Validating, and watching the general text of `documents`, comes on top.
    """
    resident = model.resident(name) if options.method != "full" else None
    weights: Trainable = AdapterWeights.of(resident) if resident else FullWeights.of(model.model)
    general = split_general(documents, options, model.base) if len(documents) else None
    options, _ = settled(options, samples, (), general)
    bare: Bare = weights.origin() if general is not None else nullcontext
    states = BaseStates(bare, general.all_held if general is not None else (), options.pack_tokens)
    _, packs = next(steps_of(samples, options, 0, 1, general, shares(model, resident)))
    seconds = 0.0
    with _learning(model, resident, options):
        for _ in range(2):
            began = time.perf_counter()
            gradients(model, weights, resident, packs, options, 1)
            hold(model, weights, resident, general, options, 1, states)
            seconds = time.perf_counter() - began
    tokens = sum(size for pack in packs for row, size in pack.sizes if row)
    epoch = math.ceil(len(samples) / options.batch_size)
    total = tokens_of(samples) * options.total_steps(len(samples)) / epoch
    return seconds * total / max(tokens, 1)


def _samples(data: Dataset | Sequence[Sample] | None) -> list[Sample]:
    if data is None:
        return []
    return list(data.samples if isinstance(data, Dataset) else data)


def _documents(given: Documents | Dataset | Sequence[Sample] | None) -> Documents:
    return given if isinstance(given, Documents) else Documents(prose=_samples(given))
