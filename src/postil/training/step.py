"""One step of a run: its packs, their gradients and those that hold to the base, float16 kept in range."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from postil.adapter.bank import Resident
from postil.adapter.model import AdaptedModel
from postil.data import Pack, Sample, epoch_steps
from postil.errors import AdapterError, RunError, listed
from postil.kernels.layout import Layout
from postil.seeds import derive
from postil.training.batch import to_device, training_spans
from postil.training.checkpoint import Progress
from postil.training.general import General
from postil.training.holding import BaseStates, kl_gradients
from postil.training.optimizer import AdamW, Trainable
from postil.training.options import Settled, TrainOptions

SCALE_FACTOR = 16.0  # the sum of a step's losses is scaled by no more than 1 and no less than LEAST_SCALE …
LEAST_SCALE = SCALE_FACTOR**-6
SCALE_STEPS = 100  # … and every so many steps a scale below 1 rises again


def steps_of(
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


def take_step(
    model: AdaptedModel,
    optimizer: AdamW,
    resident: Resident | None,
    packs: Sequence[Pack],
    general: General | None,
    states: BaseStates | None,
    progress: Progress,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """The update after progress.step, on these packs; returns what there is to log. Raises RunError where loss or
    gradient is not finite (no weight has moved), AdapterError where a module gets no gradient in the first."""
    options, weights, step = optimizer.options, optimizer.weights, progress.step + 1
    began = time.perf_counter()
    while True:
        loss, tokens, targets = gradients(model, weights, resident, packs, options, step, progress.scale)
        held = hold(model, weights, resident, general, options, step, states, progress.scale)
        norm = optimizer.clip()
        if math.isfinite(norm) or not _overflowed(model, progress, loss):
            break
        weights.grad.zero_()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        wider = "open the base in bfloat16 or float32 (dtype), " if _in_float16(model) else ""
        rows = listed(row for pack in packs for row, _ in pack.sizes if row)
        raise RunError(
            f"loss {loss}, gradient norm {norm} at step {step}; lower the learning rate "
            f"({options.learning_rate:g}), {wider}or look at rows {rows}; checkpoints before this step are kept"
        )
    if step == 1 and resident is not None:
        for line in check_gradients(resident):
            tell(line)
    rate = optimizer.update()
    progress.step = step
    progress.scale = _risen(progress.scale, step)
    return {
        "loss": loss, "learning_rate": rate, "gradient_norm": norm, "tokens": tokens, "target_tokens": targets,
        "seconds": round(time.perf_counter() - began, 4), **held,
    }  # fmt: skip


def gradients(
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
    seed = derive(options.seed, "dropout", step)
    for pack in packs:
        ids, positions, share = to_device(pack, model)
        layout = Layout.packed(pack.lengths, training_spans(resident, pack, seed), pack.before)
        with model.using(layout):
            total, _, _ = model.loss(ids, positions, share * scale)
            if total.requires_grad:
                total.backward()  # type: ignore[no-untyped-call]
        weights.collect()
        loss += float(total.detach())
    divisor = max(targets, 1) * scale
    weights.grad.div_(divisor)
    return loss / divisor, sum(size for pack in packs for _, size in pack.sizes), targets


def hold(
    model: AdaptedModel,
    weights: Trainable,
    resident: Resident | None,
    general: General | None,
    options: Settled,
    step: int,
    states: BaseStates | None,
    scale: float = 1.0,
) -> dict[str, float]:
    """The part of a step's gradients that holds the model to its base: kl_loss (nats per token) and kl_seconds."""
    kinds = general.compared(options, step) if general is not None else {}
    if not kinds or states is None:
        return {}
    began = time.perf_counter()
    means = kl_gradients(model, weights, resident, kinds, options, step, states, scale)
    told = {f"kl_{kind}": mean for kind, mean in means.items()} if len(means) > 1 else {}
    return {"kl_loss": sum(means.values()) / len(means), **told, "kl_seconds": round(time.perf_counter() - began, 4)}


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


def check_gradients(resident: Resident) -> list[str]:
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
