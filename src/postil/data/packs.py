"""Samples, and packs of whole samples within a token budget: which rows a step holds, in which order."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
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
    row: its 1-based line or row in the file. truncated: whether its end was cut off. question: a digest of all that
    stands before its last answer, equal for rows that ask the same; empty where nothing does, as in running text.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    row: int
    truncated: bool = False
    question: bytes = b""

    @property
    def target_tokens(self) -> int:
        """How many tokens have loss."""
        return int(np.count_nonzero(self.weights))


Placed = tuple[int, Sample]  # where it begins in its step


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Whole samples end to end, never padded; or parts of them, a beginning of several there once (`pack_shared`).

    ids: int64 [T]. positions: int64 [T], from 0 in every sample. weights: float32 [T], as in Sample (so the
    first token of every part has 0). lengths: tokens per part, which sum to T. rows: the parts' rows. starts: where
    each sample begins in its step, all of whose samples stand in one row of tokens: the same however the step is
    split into packs (of parts it tells nothing). before: per part the one that it continues (None: it begins by
    itself); empty where every part is a whole sample.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    lengths: tuple[int, ...]
    weights: NDArray[np.float32]
    rows: tuple[int, ...]
    starts: tuple[int, ...]
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

    @property
    def step_rows(self) -> NDArray[np.int64]:
        """int64 [T]: the place of every token in its step."""
        parts = [np.arange(start, start + n) for start, n in zip(self.starts, self.lengths, strict=True)]
        return np.concatenate(parts).astype(np.int64)


def pack(samples: Sequence[Sample], starts: Sequence[int] | None = None) -> Pack:
    """One pack of the samples, in their order, which is a step of its own unless `starts` are given.

    Raises DataError for none, and for a sample whose weights do not fit its tokens or whose first token has one.
    """
    if not samples:
        raise DataError("a pack needs at least one sample")
    for sample in samples:
        _check(sample)
    return Pack(
        ids=np.concatenate([sample.ids for sample in samples]).astype(np.int64),
        positions=np.concatenate([np.arange(len(sample.ids), dtype=np.int64) for sample in samples]),
        lengths=tuple(len(sample.ids) for sample in samples),
        weights=np.concatenate([sample.weights for sample in samples]).astype(np.float32),
        rows=tuple(sample.row for sample in samples),
        starts=tuple(_starts(samples) if starts is None else starts),
    )


def _starts(samples: Sequence[Sample]) -> list[int]:
    """Where each begins when all stand in one row of tokens."""
    return [0, *itertools.accumulate(len(sample.ids) for sample in samples)][:-1]


def _check(sample: Sample) -> None:
    if len(sample.ids) != len(sample.weights):
        raise DataError(
            f"the sample of row {sample.row} has {len(sample.ids)} tokens and {len(sample.weights)} loss weights; "
            "give one weight for each token"
        )
    if len(sample.weights) and sample.weights[0]:
        raise DataError(
            f"the sample of row {sample.row} has a loss weight of {sample.weights[0]:g} at its first token, which "
            "nothing predicts; set weights[0] to 0"
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
    for sample in samples:
        _check(sample)
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
        placed = list(zip(_starts(batch), batch, strict=True))
        chosen = [packed for group in _balanced(placed, accumulation) for packed in _first_fit(group, pack_tokens)]
        steps.append([_packed(some, share) for some in chosen])
    return steps


def _packed(placed: Sequence[Placed], share: bool) -> Pack:
    samples = [sample for _, sample in placed]
    return pack_shared(_alike_together(samples)).pack if share else pack(samples, [start for start, _ in placed])


def _alike_together(samples: Sequence[Sample]) -> list[Sample]:
    """In an order in which those with a beginning in common, of whatever length, are neighbours."""
    return sorted(samples, key=lambda sample: sample.ids.tobytes())


def _longest_first(samples: Sequence[Placed]) -> list[Placed]:
    return sorted(samples, key=lambda placed: -len(placed[1].ids))  # stable: equal lengths keep their order


def _balanced(samples: Sequence[Placed], count: int) -> list[list[Placed]]:
    """Longest first, each to the group with the fewest tokens (Graham 1969, LPT)."""
    groups: list[list[Placed]] = [[] for _ in range(min(count, len(samples)))]
    tokens = [0] * len(groups)
    for placed in _longest_first(samples):
        least = min(range(len(groups)), key=lambda index: (tokens[index], len(groups[index]), index))
        groups[least].append(placed)
        tokens[least] += len(placed[1].ids)
    return groups


def _first_fit(samples: Sequence[Placed], budget: int) -> list[list[Placed]]:
    """First-fit-decreasing bin packing (Johnson 1973): at most 11/9 of the fewest packs, plus one."""
    bins: list[list[Placed]] = []
    room: list[int] = []
    for placed in _longest_first(samples):
        length = len(placed[1].ids)
        place = next((index for index, free in enumerate(room) if free >= length), None)
        if place is None:
            bins.append([placed])
            room.append(budget - length)
        else:
            bins[place].append(placed)
            room[place] -= length
    return bins


def split_valid(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(train, valid): a seeded `share` of the rows held out by their questions, both in the given order.

    Rows that ask the same, and running texts that are the same, are all on one side, so that no held-out loss is of a
    question that was learned; questions are taken by chance while they fit the share, as near to it as whole ones
    come. At least one row is held out where share > 0 and there are two rows or more, and one always stays. Where
    the fewest rows of a question are more than a quarter of all (every row asks the same), rows are held out whatever
    they ask, equal ones together. Raises RecipeError unless 0 <= share < 1.
    """
    if not 0 <= share < 1:
        raise RecipeError(f"the share held out for validation must be from 0 to below 1, found {share}")
    rows: dict[int, list[Sample]] = {}
    for sample in samples:
        rows.setdefault(sample.row, []).append(sample)
    wanted = min(max(1, round(share * len(rows))) if share > 0 else 0, len(rows) - 1)
    generator = np.random.Generator(np.random.PCG64(seeds.derive(seed, "valid")))
    held = set[int]()
    for key in (_question, _whole, _row):
        held = held or _held_out(_grouped(rows, key), wanted, generator)
    train = [sample for sample in samples if sample.row not in held]
    return train, [sample for sample in samples if sample.row in held]


def _question(samples: Sequence[Sample]) -> bytes:
    """What a row's samples ask; all their tokens where they ask nothing."""
    return next((sample.question for sample in samples if sample.question), b"") or _whole(samples)


def _whole(samples: Sequence[Sample]) -> bytes:
    return hashlib.blake2b(b"".join(sample.ids.tobytes() for sample in samples)).digest()


def _row(samples: Sequence[Sample]) -> int:
    return samples[0].row


def _grouped(rows: Mapping[int, Sequence[Sample]], key: Callable[[Sequence[Sample]], Hashable]) -> list[list[int]]:
    """The rows of each key, in the order of its first row."""
    groups: dict[Hashable, list[int]] = {}
    for row in sorted(rows):
        groups.setdefault(key(rows[row]), []).append(row)
    return list(groups.values())


def _held_out(questions: Sequence[Sequence[int]], wanted: int, generator: np.random.Generator) -> set[int]:
    """Rows of whole questions, about `wanted`; none where even the smallest is more than a quarter of all rows and
    more than is wanted."""
    order = [questions[int(index)] for index in generator.permutation(len(questions))]
    held, left = set[int](), list[Sequence[int]]()
    for group in order:
        if len(held) + len(group) <= wanted:
            held.update(group)
        else:
            left.append(group)
    least = min(left, key=len, default=())
    rows = sum(map(len, questions))
    nearer = 0 < len(held) + len(least) - wanted < wanted - len(held)
    if len(left) > 1 and wanted and (nearer or not held) and len(held) + len(least) <= max(rows // 4, wanted):
        held.update(least)
    return held
