"""Samples, and packs of whole samples within a token budget: which rows a step holds, in which order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from postil import seeds
from postil.errors import DataError, RecipeError

PACKING = 1  # raised whenever a step of the same data, seed and options would hold other rows, or packs of them
SHARED_TOKENS = 8  # the fewest that are worth a part of their own


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One training sequence.

    ids: int32 [T].
    weights: float32 [T]; weights[t] is the loss weight of predicting ids[t] from ids[:t]; weights[0] is 0.
    row: its 1-based line or row in the file. truncated: whether its end was cut off.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    row: int
    truncated: bool = False

    @property
    def target_tokens(self) -> int:
        """How many tokens have loss."""
        return int(np.count_nonzero(self.weights))


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Whole samples end to end, never padded; or parts of them, a beginning of several there once (`pack_shared`).

    ids: int64 [T]. positions: int64 [T], from 0 in every sample. weights: float32 [T], as in Sample (so the
    first token of every part has 0). lengths: tokens per part, which sum to T. rows: the parts' rows. before: per
    part the one that it continues (None: it begins by itself); empty where every part is a whole sample.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    lengths: tuple[int, ...]
    weights: NDArray[np.float32]
    rows: tuple[int, ...]
    before: tuple[int | None, ...] = ()

    @property
    def target_tokens(self) -> int:
        """How many tokens have loss."""
        return int(np.count_nonzero(self.weights))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(row, tokens) of every whole sample, what it shares with others counted in each."""
        ends, continued = np.cumsum(self.lengths), set(self.before)
        return [
            (row, int(self.positions[end - 1]) + 1)
            for part, (row, end) in enumerate(zip(self.rows, ends, strict=True))
            if part not in continued
        ]


def pack(samples: Sequence[Sample]) -> Pack:
    """One pack of the samples, in their order; DataError for none."""
    if not samples:
        raise DataError("a pack needs at least one sample")
    return Pack(
        ids=np.concatenate([sample.ids for sample in samples]).astype(np.int64),
        positions=np.concatenate([np.arange(len(sample.ids), dtype=np.int64) for sample in samples]),
        lengths=tuple(len(sample.ids) for sample in samples),
        weights=np.concatenate([sample.weights for sample in samples]).astype(np.float32),
        rows=tuple(sample.row for sample in samples),
    )


@dataclass(frozen=True, slots=True, eq=False)
class SharedPack:
    """Samples of which neighbours that begin alike have their beginning once.

    pack: the parts end to end, beginnings and what is left of each sample; a beginning has no loss. samples: the
    parts that end the samples, in their order.
    """

    pack: Pack
    samples: tuple[int, ...]


def shared_tokens(sample: Sample, other: Sample) -> int:
    """How many first tokens two samples have in common and may share: those before the one from which the first
    target of either is predicted."""
    size = min(_untaught(sample), _untaught(other))
    apart = np.flatnonzero(sample.ids[:size] != other.ids[:size])
    common = int(apart[0]) if len(apart) else size
    return common if common >= SHARED_TOKENS else 0


def _untaught(sample: Sample) -> int:
    targets = np.flatnonzero(sample.weights)
    return max(int(targets[0]) - 1, 0) if len(targets) else 0


def pack_shared(samples: Sequence[Sample], share: bool = True) -> SharedPack:
    """One pack of the samples, in their order, neighbours sharing what they begin with; DataError for none.

    Beginnings of beginnings are shared too: the examples before all questions, each question before its choices.
    Tokens and targets stand in the pack as they do in `pack`: the state before a target is in the row before it.
    share: False where the model cannot (AdaptedModel.shares_beginnings).
    """
    if not share:
        return SharedPack(pack(samples), tuple(range(len(samples))))
    common = [0, *(shared_tokens(*pair) for pair in itertools.pairwise(samples))]  # with the one before
    parts, starts, before, ends = list[Sample](), list[int](), list[int | None](), list[int]()

    def emit(sample: Sample, start: int, end: int, earlier: int | None) -> int:
        parts.append(Sample(sample.ids[start:end], sample.weights[start:end], sample.row))
        starts.append(start)
        before.append(earlier)
        return len(parts) - 1

    def grow(first: int, last: int, start: int, earlier: int | None) -> None:
        """The parts of samples first..last, whose first `start` tokens are there already."""
        if last - first == 1:
            ends.append(emit(samples[first], start, len(samples[first].ids), earlier))
            return
        cuts = [n for n in range(first + 1, last) if common[n] < start + SHARED_TOKENS]
        if cuts:
            for one, next_one in itertools.pairwise([first, *cuts, last]):
                grow(one, next_one, start, earlier)
        else:
            end = min(common[first + 1 : last])
            grow(first, last, end, emit(samples[first], start, end, earlier))

    if samples:
        grow(0, len(samples), 0, None)
    whole = pack(parts)
    shift = np.repeat(np.array(starts, dtype=np.int64), whole.lengths)
    return SharedPack(replace(whole, positions=whole.positions + shift, before=tuple(before)), tuple(ends))


def epoch_steps(
    samples: Sequence[Sample],
    *,
    batch_size: int,
    accumulation: int,
    pack_tokens: int,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    beside: Callable[[int], Sequence[Sample]] | None = None,
    share: bool = False,
) -> list[list[Pack]]:
    """One epoch: one inner list is one optimiser step of `batch_size` samples (the last one what is left).

    A step's samples are dealt into `accumulation` groups (fewer where there are fewer samples) of about equal
    tokens, and each group into packs of at most `pack_tokens` tokens (a longer sample has a pack of its own).
    Every sample comes exactly once; `beside` gives further ones that join the batch of a step (from 0), such as
    general text. share: samples of a pack that begin alike stand together and have their beginning once. A pure
    function of its arguments. Raises RecipeError for numbers below 1.
    """
    for name, value in (
        ("batch_size", batch_size),
        ("accumulation", accumulation),
        ("pack_tokens", pack_tokens),
    ):
        if value < 1:
            raise RecipeError(f"{name} must be 1 or more, found {value}")
    order = np.arange(len(samples))
    if shuffle:
        generator = np.random.Generator(np.random.PCG64(seeds.derive(seed, "shuffle", epoch)))
        order = generator.permutation(len(samples))
    steps: list[list[Pack]] = []
    for first in range(0, len(samples), batch_size):
        batch = [samples[int(index)] for index in order[first : first + batch_size]]
        if beside is not None:
            batch += beside(len(steps))
        groups = _balanced(batch, accumulation)
        packs = [chosen for group in groups for chosen in _first_fit(group, pack_tokens)]
        steps.append([pack_shared(_alike_together(chosen)).pack if share else pack(chosen) for chosen in packs])
    return steps


def _alike_together(samples: Sequence[Sample]) -> list[Sample]:
    """In an order in which those with a beginning in common, of whatever length, are neighbours."""
    return sorted(samples, key=lambda sample: sample.ids.tobytes())


def _longest_first(samples: Sequence[Sample]) -> list[Sample]:
    return sorted(samples, key=lambda sample: -len(sample.ids))  # stable: equal lengths keep their order


def _balanced(samples: Sequence[Sample], count: int) -> list[list[Sample]]:
    """Longest first, each to the group with the fewest tokens (Graham 1969, LPT)."""
    groups: list[list[Sample]] = [[] for _ in range(min(count, len(samples)))]
    tokens = [0] * len(groups)
    for sample in _longest_first(samples):
        least = min(range(len(groups)), key=lambda index: (tokens[index], len(groups[index]), index))
        groups[least].append(sample)
        tokens[least] += len(sample.ids)
    return groups


def _first_fit(samples: Sequence[Sample], budget: int) -> list[list[Sample]]:
    """First-fit-decreasing bin packing (Johnson 1973): at most 11/9 of the fewest packs, plus one."""
    bins: list[list[Sample]] = []
    room: list[int] = []
    for sample in _longest_first(samples):
        length = len(sample.ids)
        place = next((index for index, free in enumerate(room) if free >= length), None)
        if place is None:
            bins.append([sample])
            room.append(budget - length)
        else:
            bins[place].append(sample)
            room[place] -= length
    return bins


def split_valid(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(train, valid): a seeded `share` of the rows held out, both in the given order.

    Samples of one row stay together. At least one row is held out where share > 0 and there are two rows or
    more, and at least one always stays. Raises RecipeError unless 0 <= share < 1.
    """
    if not 0 <= share < 1:
        raise RecipeError(f"the share held out for validation must be from 0 to below 1, found {share}")
    rows = sorted({sample.row for sample in samples})
    wanted = max(1, round(share * len(rows))) if share > 0 else 0
    generator = np.random.Generator(np.random.PCG64(seeds.derive(seed, "valid")))
    chosen = generator.permutation(len(rows))[: max(0, min(wanted, len(rows) - 1))]
    held = {rows[int(index)] for index in chosen}
    train = [sample for sample in samples if sample.row not in held]
    return train, [sample for sample in samples if sample.row in held]
