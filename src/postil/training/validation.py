"""Validation: which held-out rows are measured, and how often, so that it takes about a tenth of a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from postil.adapter.bank import Resident
from postil.adapter.model import AdaptedModel
from postil.data import Sample, epoch_steps
from postil.kernels.layout import Layout
from postil.seeds import derive
from postil.training.batch import spans_of, to_device

MOST = 10  # validations of a run
FEWEST_ROWS = 32  # that are measured, where so many are held out
WATCHED = 4  # validations at the least where a guard chooses among the states
SHARE = 0.2  # tokens that are measured to tokens that are learned: one passes forward, the other back as well


@dataclass(frozen=True, slots=True)
class Validations:
    """How a run is validated: on how many of the held-out rows (in the order of `spread`), every how many steps."""

    rows: int
    every: int


def validations(
    learned: int,
    steps: int,
    held_out: Sequence[int],
    watched: int = 0,
    *,
    guarded: bool = False,
    rows: int | None = None,
    every: int | None = None,
) -> Validations:
    """Validations that take about a tenth of a run, by counting tokens, so that the choice is the same everywhere.

    learned: tokens that all `steps` pass through; held_out: tokens of each held-out row, in the order of `spread`;
    watched: tokens of general text measured each time; guarded: a guard chooses among the measured states. rows,
    every: where they are given, they stay.
    """
    budget = SHARE * learned
    times = MOST if every is None else max(steps // every, 1)
    count, tokens = 0, watched
    for size in held_out:
        enough = count >= FEWEST_ROWS and times * (tokens + size) > budget
        if enough if rows is None else count == rows:
            break
        count, tokens = count + 1, tokens + size
    if every is None:
        affordable = min(max(int(budget // max(tokens, 1)), WATCHED if guarded else 1), MOST)
        every = max(math.ceil(steps / affordable), 1)
    return Validations(count, every)


def measured(samples: Sequence[Sample], rows: int) -> list[Sample]:
    """The first `rows` of `spread`, in the order that they were given in."""
    wanted = {id(sample) for sample in spread(samples)[:rows]}
    return [sample for sample in samples if id(sample) in wanted]


def spread(samples: Sequence[Sample]) -> list[Sample]:
    """Held-out samples in a fixed order to be measured in, every prompt once before any comes again."""
    order = np.random.Generator(np.random.PCG64(derive(0, "validation"))).permutation(len(samples))
    seen: dict[bytes, int] = {}
    turns = list[tuple[int, int]]()
    for place, index in enumerate(order):
        prompt = _prompt(samples[int(index)])
        turns.append((seen.get(prompt, 0), place))
        seen[prompt] = turns[-1][0] + 1
    return [samples[int(order[place])] for _, place in sorted(turns)]


def _prompt(sample: Sample) -> bytes:
    """What stands before a sample's first target."""
    targets = np.flatnonzero(sample.weights)
    return sample.ids[: int(targets[0]) if len(targets) else len(sample.ids)].tobytes()


def tokens_of(samples: Iterable[Sample]) -> int:
    """The tokens that pass through the model."""
    return sum(len(sample.ids) for sample in samples)


@torch.no_grad()
def validate(model: AdaptedModel, samples: Sequence[Sample], resident: Resident | None, pack_tokens: int) -> float:
    """Mean nats per target token over held-out samples, dropout off."""
    total, count = 0.0, 0
    steps = epoch_steps(
        samples, batch_size=32, accumulation=1, pack_tokens=pack_tokens, seed=0, epoch=0, shuffle=False,
        share=model.shares_beginnings,
    )  # fmt: skip
    for packs in steps:
        for pack in packs:
            ids, positions, weights = to_device(pack, model)
            with model.using(Layout.packed(pack.lengths, spans_of(resident, len(pack.ids)), pack.before)):
                part, _, targets = model.loss(ids, positions, weights)
            total += float(part)
            count += len(targets)
    return total / max(count, 1)
