"""General text beside the target's rows: windows to watch, and windows that hold the adapter to its base."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from postil.adapter.bank import Resident
from postil.adapter.divergence import Bare, kl_to_base
from postil.adapter.model import AdaptedModel
from postil.base import Base
from postil.data import Sample, epoch_steps
from postil.errors import RecipeError
from postil.kernels.layout import Layout
from postil.seeds import derive
from postil.training.batch import spans_of, to_device
from postil.training.optimizer import Trainable
from postil.training.options import Settled, TrainOptions

WINDOW = 512  # tokens of a watched window


@dataclass(frozen=True, slots=True)
class General:
    """Windows of general text, watched and held from different documents. A window's `row` is 0: it has none.

    watched: at most options.watch_windows of WINDOW tokens; held: of options.general_tokens tokens each.
    """

    watched: tuple[Sample, ...]
    held: tuple[Sample, ...]
    documents: int

    def mixed(self, options: Settled, step: int) -> list[Sample]:
        """The windows that join the rows of step `step` (general_share), a pure function of seed and step."""
        count = max(1, round(options.general_share * options.batch_size)) if options.general_share else 0
        return _drawn(self.held, options.seed, "mix", step, count)

    def compared(self, options: TrainOptions, step: int) -> list[Sample]:
        """The windows on which step `step` compares adapter and base (kl_weight), likewise."""
        return _drawn(self.held, options.seed, "kl", step, options.kl_rows if options.kl_weight else 0)

    def lines(self, options: Settled) -> list[str]:
        """What is done with the text, in sentences for the user."""
        watched = sum(window.target_tokens for window in self.watched)
        bound = "" if options.guard is None else f"; no state more than {options.guard:g} nats above the base is kept"
        lines = [f"general text: {self.documents} documents; {watched:,} tokens watched at each validation{bound}"]
        if options.kl_weight:
            lines.append(
                f"each step: {options.kl_weight:g} × KL to the base over {options.kl_rows} general rows "
                f"of {options.general_tokens} tokens"
            )
        if options.general_share:
            count = max(1, round(options.general_share * options.batch_size))
            lines.append(f"each step: {count} general rows of {options.general_tokens} tokens among its rows")
        return lines


def check_general(options: TrainOptions, given: bool) -> None:
    """Raise RecipeError where an option needs general text and none is given."""
    wanted = {
        "guard": options.guard is not None,
        "kl_weight": options.kl_weight > 0,
        "general_share": options.general_share > 0,
    }
    for name in [name for name, on in wanted.items() if on and not given][:1]:
        raise RecipeError(
            f"training.{name} needs general text: name a file of your own with --general (general: in a recipe), "
            'JSONL rows {"text": …} of what must not get worse; the sample that ships with postil is used for '
            "choosing nothing"
        )


def split_general(documents: Sequence[Sample], options: TrainOptions, base: Base) -> General:
    """Half of the documents (samples of one row are one) to watch, half to hold to; the halves never change.

    The watched windows are spread evenly over their half. The split depends on the documents alone, so that
    runs with other options or seeds watch the same text. A document's end of sequence parts it from the next
    and is neither measured nor learned. Raises RecipeError where there is too little.
    """
    end = getattr(base.tokenizer, "eos_token_id", None)
    samples = [_open(sample, end) for sample in documents]
    whole = [list(parts) for _, parts in groupby(samples, key=lambda sample: sample.row)]
    order = np.random.Generator(np.random.PCG64(derive(0, "general"))).permutation(len(whole))
    middle = (len(whole) + 1) // 2
    halves = [[whole[int(index)] for index in order[part]] for part in (slice(0, middle), slice(middle, None))]
    watch, hold = (min(size, base.context or size) for size in (WINDOW, options.general_tokens))
    watched, held = _windows(halves[0], watch), _windows(halves[1], hold)
    if not watched:
        raise RecipeError("the general text has no document of two tokens or more to watch; give a longer one")
    if not held and (options.kl_weight or options.general_share):
        raise RecipeError(
            f"the general text has {len(whole)} document(s), and half of them are watched; "
            "kl_weight and general_share need at least one more"
        )
    count = min(options.watch_windows, len(watched))
    spread = [watched[index * len(watched) // count] for index in range(count)]
    return General(tuple(spread), tuple(held), len(whole))


def _open(sample: Sample, end: int | None) -> Sample:
    """The sample without loss on its end of sequence."""
    if not len(sample.ids) or sample.ids[-1] != end:
        return sample
    weights = sample.weights.copy()
    weights[-1] = 0.0
    return replace(sample, weights=weights)


def _windows(documents: Iterable[Sequence[Sample]], size: int) -> list[Sample]:
    """The documents end to end, cut into windows of `size` tokens; a shorter rest only where there is no other."""
    parts = [sample for document in documents for sample in document]
    if not parts:
        return []
    ids = np.concatenate([sample.ids for sample in parts])
    weights = np.concatenate([sample.weights for sample in parts])
    windows: list[Sample] = []
    for start in range(0, len(ids), size):
        weight = weights[start : start + size].copy()
        weight[0] = 0.0
        if weight.any() and (len(weight) == size or not windows):
            windows.append(Sample(ids[start : start + size], weight, row=0))
    return windows


def _drawn(windows: Sequence[Sample], seed: int, purpose: str, step: int, count: int) -> list[Sample]:
    """The `count` windows of step `step` (from 1): every window once before any comes again."""
    out = []
    for place in range((step - 1) * count, step * count):
        again, index = divmod(place, len(windows))
        out.append(windows[int(_order(len(windows), derive(seed, "general", purpose, again))[index])])
    return out


@lru_cache(maxsize=4)
def _order(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64(seed)).permutation(count)


def kl_gradients(
    model: AdaptedModel,
    weights: Trainable,
    resident: Resident | None,
    rows: Sequence[Sample],
    options: TrainOptions,
    step: int,
    bare: Bare,
    scale: float = 1.0,
) -> float:
    """Add the gradient of kl_weight · mean KL(base||adapted) over the rows' tokens; returns the mean (nats).

    Divided by its own tokens, whatever the target's rows are, and split into packs as they are; the backward pass is
    the sum's (times `scale`), as the target's is. It costs a forward pass of the base and a training pass over these
    rows.
    """
    (packs,) = epoch_steps(
        rows, batch_size=len(rows), accumulation=options.accumulation, pack_tokens=options.pack_tokens,
        seed=0, epoch=0, shuffle=False,
    )  # fmt: skip
    tokens = sum(pack.target_tokens for pack in packs)
    divisor = tokens * scale / options.kl_weight
    weights.grad.mul_(divisor)  # what is there already: one buffer, so that a whole model needs no second
    mean = 0.0
    for index, pack in enumerate(packs):
        seed = derive(options.seed, "dropout", step, "general", index)
        ids, positions, share = to_device(pack, model)
        targets = share.nonzero(as_tuple=True)[0]
        with model.using(Layout.packed(pack.lengths, spans_of(resident, len(pack.ids), seed))):
            total, _ = kl_to_base(model, ids, positions, targets - 1, bare=bare)
            if total.requires_grad:
                (total * scale).backward()  # type: ignore[no-untyped-call]
        weights.collect()
        mean += float(total.detach()) / tokens
    weights.grad.div_(divisor)
    return mean
