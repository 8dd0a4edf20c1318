"""What a run is trained with where nothing is given: numbers chosen from how much there is to learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from postil.data import Sample
from postil.errors import listed
from postil.training.general import General
from postil.training.options import Settled, TrainOptions
from postil.training.validation import spread, tokens_of, validations

BATCH = 8  # rows of a step
UPDATES = 350  # of a run over few rows
MOST_EPOCHS = {"lora": 10, "qlora": 10, "full": 3}
FEW, MANY = 2_000, 50_000  # rows, up to and from which LoRA's rate is …
RATE, LEAST_RATE, FULL_RATE = 1e-3, 2e-4, 2e-5  # … the first and the second, and that of full fine-tuning
FEW_HELD, RATE_HELD, MOST_EPOCHS_HELD = 500, 2e-3, 5  # of LoRA held to its base, which bears more (bench/LOG.md)
WARMUP = 0.05  # of the steps
HELD = 1.0  # times the KL to the base, where there are general rows and an adapter is trained
PATIENCE = 3  # validations, where the rows are seen more than once


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is chosen where nothing is given, fields as in TrainOptions, and `why`, in sentences for the user."""

    learning_rate: float
    epochs: int
    batch_size: int
    warmup: float
    patience: int
    why: tuple[str, ...]


def chosen(
    rows: int,
    target_tokens: int,
    row_tokens: float,
    method: str,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    held_out: int = 0,
    guarded: bool = False,
    held: bool = False,
) -> Chosen:
    """The numbers for `rows` rows of row_tokens tokens each in the mean, target_tokens of all of them learned.

    epochs, steps, batch_size: the user's, where they gave one; held_out: rows to stop early by; guarded: a guard
    chooses the state, and what comes after the best held-out one may be it; held: each step is held to the base.
    """
    batch, held = batch_size or BATCH, held and method != "full"
    most = MOST_EPOCHS_HELD if held else MOST_EPOCHS[method]
    passes = epochs or min(max(round(UPDATES * batch / max(rows, 1)), 1), most)
    if steps is not None:
        passes = math.ceil(steps * batch / max(rows, 1))
    rate = FULL_RATE if method == "full" else _falling(rows, held)
    patience = PATIENCE if passes > 1 and held_out and not guarded else 0
    want = "several passes" if passes > 1 else "one pass"
    if method != "full":
        want += f" at a {'high' if rate >= RATE else 'lower'} rate"
    why = f"{rows:,} rows of {row_tokens:.0f} tokens, {target_tokens:,} of them learned, want {want}"
    return Chosen(rate, passes, batch, WARMUP, patience, (why,))


def _falling(rows: int, held: bool) -> float:
    """RATE up to FEW rows (those of a held adapter), LEAST_RATE from MANY on, between them straight on logarithmic
    scales; two digits."""
    few, rate = (FEW_HELD, RATE_HELD) if held else (FEW, RATE)
    share = math.log(min(max(rows, few), MANY) / few) / math.log(MANY / few)
    return float(f"{rate * (LEAST_RATE / rate) ** share:.2g}")


def settled(
    options: TrainOptions,
    samples: Sequence[Sample],
    valid: Sequence[Sample] = (),
    general: General | None = None,
) -> tuple[Settled, tuple[str, ...]]:
    """The options with every number that they leave to the data; what was chosen and why, for the user (nothing where
    rate, epochs and batch are given).

    general: what every validation measures beside under a guard, else the last one, and what an adapter is held to.
    """
    given = options.model_dump()
    tokens, guarded = tokens_of(samples), options.guard is not None
    watched, held = (general.watched_tokens, general.all_held) if general is not None else (0, ())
    by_default = HELD if held and options.method != "full" else 0.0
    weight = by_default if options.kl_weight is None else options.kl_weight
    found = chosen(
        len(samples), sum(sample.target_tokens for sample in samples), tokens / max(len(samples), 1), options.method,
        epochs=options.epochs, steps=options.steps, batch_size=options.batch_size, held_out=len(valid),
        guarded=guarded, held=weight > 0,
    )  # fmt: skip
    epoch = math.ceil(len(samples) / found.batch_size)
    steps = options.steps or found.epochs * epoch
    plan = validations(
        round(tokens * steps / max(epoch, 1)), steps, [len(sample.ids) for sample in spread(valid)],
        watched if guarded else 0,
        guarded=guarded, rows=options.valid_rows, every=options.valid_every,
    )  # fmt: skip
    values = {key: getattr(found, key) for key in ("learning_rate", "epochs", "batch_size", "warmup", "patience")}
    values |= {"valid_rows": plan.rows, "valid_every": plan.every}
    values["kl_weight"] = weight
    now = Settled(**given | {key: value for key, value in values.items() if given[key] is None})
    named = {"learning_rate": "learning rate", "epochs": "epochs", "batch_size": "batch size"}
    ours = [name for key, name in named.items() if given[key] is None and not (key == "epochs" and options.steps)]
    return now, tuple(f"chosen from the data: {listed(ours)}; {reason}" for reason in found.why if ours)
