"""Packs and steps: every row once, order pure in (seed, epoch), budgets kept, balanced groups, hold-out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postil.data import Pack, Sample, epoch_steps, pack, split_valid
from postil.data.packs import SHARED_TOKENS, pack_shared
from postil.errors import DataError, RecipeError


def make(lengths: list[int]) -> list[Sample]:
    """Samples whose ids name row and position, with weight 0 at the first position."""
    samples = []
    for row, length in enumerate(lengths, start=1):
        ids = np.arange(length, dtype=np.int32) + 1000 * row
        weights = np.full(length, 0.5 if row % 2 else 1.0, dtype=np.float32)
        weights[0] = 0
        samples.append(Sample(ids, weights, row))
    return samples


def shape(steps: list[list[Pack]]) -> list[list[tuple[int, ...]]]:
    return [[chosen.rows for chosen in step] for step in steps]


_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=40)
_counts = st.integers(1, 9)


def test_pack_holds_whole_samples_end_to_end() -> None:
    got = pack(make([3, 1, 2]))
    assert got.ids.tolist() == [1000, 1001, 1002, 2000, 3000, 3001]
    assert got.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert got.weights.tolist() == [0, 0.5, 0.5, 0, 0, 0.5]
    assert (got.lengths, got.rows, got.target_tokens) == ((3, 1, 2), (1, 2, 3), 3)
    assert (got.ids.dtype, got.positions.dtype, got.weights.dtype) == (np.int64, np.int64, np.float32)
    assert got.step_rows.tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(DataError, match="at least one sample"):
        pack([])


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (
            Sample(np.arange(2, dtype=np.int32), np.ones(2, np.float32), 7),
            "row 7 has a loss weight of 1 at its first",
        ),
        (Sample(np.arange(2, dtype=np.int32), np.zeros(3, np.float32), 7), "row 7 has 2 tokens and 3 loss weights"),
    ],
)
def test_a_weight_that_nothing_could_learn_is_refused(sample: Sample, said: str, place: int) -> None:
    """The first of a pack would have no state to be predicted from, a later one that of the sample before it."""
    samples = make([3, 4])
    samples[place:place] = [sample]
    numbers = {"batch_size": 9, "accumulation": 1, "pack_tokens": 99, "seed": 0, "epoch": 0}
    for made in (pack, pack_shared, lambda some: epoch_steps(some, **numbers)):
        with pytest.raises(DataError, match=said):
            made(samples)


@given(_lengths, _counts, _counts, st.integers(1, 60), st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_an_epoch(
    lengths: list[int], batch: int, accumulation: int, budget: int, seed: int, epoch: int, shuffle: bool
) -> None:
    samples = make(lengths)

    def plan(seed: int, epoch: int) -> list[list[Pack]]:
        return epoch_steps(
            samples,
            batch_size=batch,
            accumulation=accumulation,
            pack_tokens=budget,
            seed=seed,
            epoch=epoch,
            shuffle=shuffle,
        )

    steps = plan(seed, epoch)
    # every row exactly once, batch_size rows a step
    sizes = [sum(len(chosen.rows) for chosen in step) for step in steps]
    full, left = divmod(len(samples), batch)
    assert sizes == [batch] * full + [left] * bool(left)
    assert sorted(row for step in steps for chosen in step for row in chosen.rows) == list(range(1, len(samples) + 1))
    for step, size in zip(steps, sizes, strict=True):
        assert len(step) >= min(accumulation, size)
        for chosen in step:
            # budgets hold, and what a pack says of itself is so
            assert len(chosen.ids) <= budget or len(chosen.rows) == 1
            assert sum(chosen.lengths) == len(chosen.ids) == len(chosen.positions) == len(chosen.weights)
            start = 0
            for row, length in zip(chosen.rows, chosen.lengths, strict=True):
                part = slice(start, start + length)
                assert chosen.ids[part].tolist() == samples[row - 1].ids.tolist()
                assert chosen.weights[part].tolist() == samples[row - 1].weights.tolist()
                assert chosen.positions[part].tolist() == list(range(length))
                start += length
    # pure in (seed, epoch)
    assert shape(steps) == shape(plan(seed, epoch))


@given(_lengths, _counts, st.integers(1, 60))
def test_accumulation_does_not_change_which_rows_a_step_holds(lengths: list[int], batch: int, budget: int) -> None:
    def rows(accumulation: int) -> list[list[int]]:
        steps = epoch_steps(
            make(lengths),
            batch_size=batch,
            accumulation=accumulation,
            pack_tokens=budget,
            seed=1,
            epoch=2,
        )
        return [sorted(row for chosen in step for row in chosen.rows) for step in steps]

    assert rows(1) == rows(2) == rows(4)


@given(_lengths, _counts, st.integers(1, 60), st.sampled_from([1, 2, 4]))
def test_every_token_has_one_place_in_its_step_whatever_the_split(
    lengths: list[int], batch: int, budget: int, accumulation: int
) -> None:
    def places(accumulation: int, budget: int) -> list[dict[int, int]]:
        """Per step, the place of every token (which names itself)."""
        steps = epoch_steps(
            make(lengths), batch_size=batch, accumulation=accumulation, pack_tokens=budget, seed=1, epoch=2
        )
        return [
            {int(i): int(row) for one in step for i, row in zip(one.ids, one.step_rows, strict=True)}
            for step in steps
        ]

    found = places(accumulation, budget)
    assert found == places(1, 10**6)
    assert all(sorted(step.values()) == list(range(len(step))) for step in found)


def test_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, shuffle: bool = True) -> list[int]:
        steps = epoch_steps(
            make([3] * 30),
            batch_size=1,
            accumulation=1,
            pack_tokens=8,
            seed=seed,
            epoch=epoch,
            shuffle=shuffle,
        )
        return [row for step in steps for chosen in step for row in chosen.rows]

    assert order(0, 0, False) == list(range(1, 31))
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert order(0, 0)[:5] == [29, 13, 7, 8, 24]  # the same on every machine and version


def test_groups_are_balanced_and_packs_filled() -> None:
    def packs(accumulation: int, budget: int) -> list[tuple[int, ...]]:
        (step,) = epoch_steps(
            make([7, 5, 4, 3, 3, 2]),
            batch_size=6,
            accumulation=accumulation,
            pack_tokens=budget,
            seed=0,
            epoch=0,
            shuffle=False,
        )
        return [chosen.lengths for chosen in step]

    assert packs(1, 8) == [(7,), (5, 3), (4, 3), (2,)]
    assert packs(2, 100) == [(7, 3, 2), (5, 4, 3)]
    assert packs(9, 100) == [(7,), (5,), (4,), (3,), (3,), (2,)]
    assert packs(1, 4) == [(7,), (5,), (4,), (3,), (3,), (2,)]


@pytest.mark.parametrize("name", ["batch_size", "accumulation", "pack_tokens"])
def test_numbers_below_one_are_refused(name: str) -> None:
    numbers = {"batch_size": 1, "accumulation": 1, "pack_tokens": 1, name: 0}
    with pytest.raises(RecipeError, match=f"{name} must be 1 or more, found 0"):
        epoch_steps(make([1]), **numbers, seed=0, epoch=0)


@given(_lengths, st.floats(0, 0.99), st.integers(0, 5))
def test_split_valid(lengths: list[int], share: float, seed: int) -> None:
    samples = make(lengths)
    samples += [Sample(sample.ids, sample.weights, sample.row) for sample in samples[::2]]  # rows in two pieces
    train, valid = split_valid(samples, share, seed)
    rows = len(lengths)
    held = {sample.row for sample in valid}
    assert held.isdisjoint(sample.row for sample in train)
    assert [sample for sample in samples if sample.row in held] == valid
    assert [sample for sample in samples if sample.row not in held] == train
    wanted = 0 if share == 0 else min(max(1, round(share * rows)), rows - 1)
    assert len(held) == wanted
    again = split_valid(samples, share, seed)
    assert [sample.row for sample in again[1]] == [sample.row for sample in valid]


def test_split_valid_depends_on_the_seed_and_refuses_nonsense() -> None:
    samples = make([2] * 40)
    chosen = {tuple(sample.row for sample in split_valid(samples, 0.1, seed)[1]) for seed in range(5)}
    assert len(chosen) > 1
    for share in (-0.1, 1.0):
        with pytest.raises(RecipeError, match="from 0 to below 1"):
            split_valid(samples, share, 0)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), max_size=4), st.integers(0, 4), st.integers(0, 3)),
        min_size=1, max_size=14,
    ),
    st.booleans(),
)  # fmt: skip
def test_shared_beginnings_leave_every_sample_whole(kinds: list[tuple[list[int], int, int]], sort: bool) -> None:
    """Prompts of blocks of five tokens, by their first number: ids, positions and weights of each sample, read back
    along the parts that it continues."""
    samples = []
    for blocks, more, answer in sorted(kinds) if sort else kinds:
        prompt = [100 * block + n for block in blocks for n in range(5)] + [7] * more
        ids = np.array([*prompt, 1, *[9] * answer], dtype=np.int32)
        weights = np.repeat([0.0, 1.0], [len(prompt) + 1, answer]).astype(np.float32)
        samples.append(Sample(ids, weights, len(samples) + 1))
    got = pack_shared(samples)
    edges = np.cumsum([0, *got.pack.lengths])
    assert len(got.samples) == len(samples)
    assert list(got.samples) == sorted(got.samples)
    for sample, place in zip(samples, got.samples, strict=True):
        chain: list[int] = []
        part: int | None = place
        while part is not None:
            chain = [*range(edges[part], edges[part + 1]), *chain]
            assert part == place or part not in got.samples
            part = got.pack.before[part]
        assert got.pack.ids[chain].tolist() == sample.ids.tolist()
        assert got.pack.positions[chain].tolist() == list(range(len(sample.ids)))
        assert got.pack.weights[chain].tolist() == sample.weights.tolist()
        assert not got.pack.weights[edges[place]]  # the state before a target is in its own part
    parts = {place for place in got.pack.before if place is not None}
    assert len(got.pack.lengths) == len(parts) + len(samples)
    assert all(sum(earlier == part for earlier in got.pack.before) > 1 for part in parts)  # only what several share
    assert all(got.pack.lengths[part] >= SHARED_TOKENS for part in parts)
    apart = pack_shared(samples, share=False)
    assert (apart.pack.lengths, apart.pack.before) == (tuple(len(s.ids) for s in samples), ())
    if not parts:
        assert got.pack.ids.tolist() == apart.pack.ids.tolist()


@given(_counts, st.integers(1, 60), st.integers(0, 3), st.lists(st.integers(0, 2), min_size=1, max_size=20))
def test_an_epoch_whose_rows_share_their_beginnings(batch: int, budget: int, seed: int, kinds: list[int]) -> None:
    samples = [
        Sample(
            np.array([*range(100 * kind, 100 * kind + 9), 1, row], dtype=np.int32),
            np.array([0.0] * 10 + [1.0], dtype=np.float32), row,
        )
        for row, kind in enumerate(kinds, 1)
    ]  # fmt: skip

    def plan(share: bool) -> list[list[Pack]]:
        return epoch_steps(
            samples, batch_size=batch, accumulation=2, pack_tokens=budget, seed=seed, epoch=0, share=share
        )

    shared, apart = plan(True), plan(False)
    assert shape(shared) == shape(plan(True))
    for step, other in zip(shared, apart, strict=True):
        for got, wanted in zip(step, other, strict=True):
            assert sorted(got.sizes) == sorted(wanted.sizes) == sorted((row, 11) for row in wanted.rows)
            assert got.target_tokens == wanted.target_tokens
            groups = {kinds[row - 1] for row in wanted.rows}
            assert len(got.ids) <= len(wanted.ids)
            assert len(got.ids) == 2 * len(wanted.rows) + 9 * len(groups)  # each beginning once, however dealt


def test_examples_are_shared_by_all_questions_and_a_question_by_its_choices() -> None:
    examples = list(range(10, 30))
    samples = [
        Sample(
            np.array([*examples, *[100 + question] * 9, 1, 50 + choice], dtype=np.int32),
            np.array([0.0] * 30 + [1.0], dtype=np.float32), 1,
        )
        for question in range(2) for choice in range(3)
    ]  # fmt: skip
    got = pack_shared(samples)
    assert got.pack.lengths == (20, 9, 2, 2, 2, 9, 2, 2, 2)
    assert got.pack.before == (None, 0, 1, 1, 1, 0, 5, 5, 5)
    assert got.samples == (2, 3, 4, 6, 7, 8)
    with pytest.raises(DataError, match="at least one sample"):
        pack_shared([])


def asking(questions: list[int], seed: int = 0) -> list[Sample]:
    """A row for each number: rows of one number ask the same and answer something else."""
    return [
        Sample(np.array([question, 5, 100 + row], dtype=np.int32), np.array([0, 0, 1], dtype=np.float32), row,
               question=f"{question}".encode())
        for row, question in enumerate(questions, start=1)
    ]  # fmt: skip


@given(st.lists(st.integers(0, 12), min_size=1, max_size=80), st.floats(0, 0.6), st.integers(0, 5))
def test_rows_that_ask_the_same_are_held_out_together(questions: list[int], share: float, seed: int) -> None:
    samples = asking(questions)
    train, valid = split_valid(samples, share, seed)
    held = {sample.row for sample in valid}
    assert train
    assert sorted(sample.row for sample in (*train, *valid)) == [sample.row for sample in samples]
    assert [sample.row for sample in split_valid(samples, share, seed)[1]] == [sample.row for sample in valid]
    wanted = min(max(1, round(share * len(questions))) if share else 0, len(questions) - 1)
    assert bool(held) == (wanted > 0)
    least = min(questions.count(one) for one in questions)
    if wanted and least <= len(questions) // 4:
        assert {one.question for one in train}.isdisjoint(one.question for one in valid)
        assert len(held) <= max(len(questions) // 4, 2 * wanted)


def test_the_share_is_met_as_near_as_whole_questions_come() -> None:
    def held(questions: list[int], share: float) -> int:
        return len(split_valid(asking(questions), share, 0)[1])

    assert held([n // 8 for n in range(400)], 0.1) == 40  # 50 questions of eight rows: five of them
    assert held([n // 8 for n in range(400)], 0.055) == 24  # 22 are wanted: 24 is nearer than 16
    assert held([n // 8 for n in range(400)], 0.045) == 16  # 18 are wanted: 16 is nearer than 24
    assert held([n // 25 for n in range(100)], 0.05) == 25  # a question at least
    assert held([*[0] * 99, 1], 0.05) == 1


def test_where_every_row_asks_the_same_rows_are_held_out_and_equal_ones_together() -> None:
    assert len(split_valid(asking([0] * 100), 0.05, 0)[1]) == 5
    twice = [
        Sample(one.ids, one.weights, 2 * one.row + again, question=one.question)
        for one in asking([0] * 50) for again in (0, 1)
    ]  # fmt: skip
    train, valid = split_valid(twice, 0.05, 0)
    assert len(valid) in (4, 6)
    assert {one.ids.tobytes() for one in train}.isdisjoint(one.ids.tobytes() for one in valid)
    same = [Sample(twice[0].ids, twice[0].weights, row) for row in range(1, 11)]
    assert [len(part) for part in split_valid(same, 0.1, 0)] == [9, 1]
