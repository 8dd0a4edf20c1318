"""Dropout's masks: named by seed, group and member, counted by row and column, as random as they should be."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postil.kernels.adapted_linear import AdapterSlot, Group
from postil.kernels.adapted_linear.dropout import dropout, dropped
from postil.kernels.adapted_linear.op import drop
from postil.kernels.layout import Rows, Span, Spans

KEY = 0x1234_5678_9ABC_DEF0


def by_hand(key: int, row: int, column: int, columns: int, probability: float) -> bool:
    """SplitMix64 in Python's own integers."""
    whole = 2**64
    words = -(-columns // 4)
    z = (key + (row * words + column // 4 + 1) * 0x9E3779B97F4A7C15) % whole
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % whole
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % whole
    z ^= z >> 31
    lane = z >> 16 * (column % 4) & 0xFFFF
    return (lane - 2**16 if lane >= 2**15 else lane) < round(probability * 2**16) - 2**15


def test_the_hash_is_splitmix64() -> None:
    """The first outputs of the authors' own code from the seed 1234567."""
    known = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    words = torch.tensor([value - 2**64 if value >= 2**63 else value for value in known])
    lanes = words.view(torch.int16)
    for probability in (0.1, 0.5, 0.9):
        expected = lanes < round(probability * 2**16) - 2**15
        assert dropped(1234567, torch.tensor([0]), 12, probability)[0].tolist() == expected.tolist()


@given(
    st.integers(0, 2**63 - 1),
    st.lists(st.integers(0, 2**40), max_size=4),
    st.integers(1, 11),
    st.sampled_from([0.0, 0.05, 0.5, 0.999999999]),
)
def test_equals_the_hash_by_hand(key: int, rows: list[int], columns: int, probability: float) -> None:
    got = dropped(key, torch.tensor(rows, dtype=torch.int64), columns, min(probability, 1 - 2**-17))
    assert got.tolist() == [
        [by_hand(key, row, column, columns, min(probability, 1 - 2**-16)) for column in range(columns)]
        for row in rows
    ]


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("columns", [64, 577])
def test_values_are_dropped_with_their_probability_and_alone(columns: int, probability: float) -> None:
    """The share of all, of each row and column, and how two neighbours, two rows and two keys go together."""
    rows = torch.arange(1000, 1000 + 4096)
    mask = dropped(KEY, rows, columns, probability).double() - probability
    spread = (probability * (1 - probability)) ** 0.5

    def within(values: torch.Tensor, count: int, deviation: float) -> bool:
        """Means over `count` values: within 5.5 standard deviations."""
        return bool((values.abs() < 5.5 * deviation / count**0.5).all())

    assert within(mask.mean(), mask.numel(), spread)
    assert within(mask.mean(0), len(rows), spread)
    assert within(mask.mean(1), columns, spread) or probability in (0.05, 0.9)  # a short row is no normal law
    other = dropped(KEY + 1, rows, columns, probability).double() - probability
    for first, second in ((mask[:, 1:], mask[:, :-1]), (mask[1:], mask[:-1]), (mask, other), (mask[64:], mask[:-64])):
        assert within((first * second).mean(), first.numel(), spread**2)


def test_the_expectation_is_x_in_every_dtype() -> None:
    for dtype, probability in itertools.product((torch.float32, torch.bfloat16), (0.1, 0.3, 1e-7, 1 - 1e-7)):
        x = torch.full((2000, 64), 3.0, dtype=dtype)
        y = dropout(x, KEY, torch.arange(2000), probability)
        assert y.dtype == dtype
        assert len(y.unique()) == (1 if probability == 1e-7 else 2)
        if probability < 0.5:
            assert float(y.double().mean()) == pytest.approx(3.0, rel=0.01)
    assert torch.equal(x, torch.full((2000, 64), 3.0, dtype=torch.bfloat16))  # x itself is left alone


def slot(probability: float = 0.5) -> AdapterSlot:
    return AdapterSlot(
        torch.zeros(4, 64), (torch.zeros(8, 2), torch.zeros(8, 2)), (1.0, 1.0), (None, None), probability
    )


def mask(spans: Spans, group: str = "g", member: int = 0, columns: int = 64) -> torch.Tensor:
    (span,) = spans.items
    ones = torch.ones(span.end - span.start, columns)
    return drop(ones, Group(group, ()), member, slot(), spans, span) == 0


def test_masks_are_named_by_seed_group_and_member() -> None:
    one = Spans((Span(0, 50, 0, seed=1),))
    masks = [mask(one), mask(one, "other"), mask(one, member=1), mask(Spans((Span(0, 50, 0, seed=2),)))]
    assert torch.equal(masks[0], mask(one))
    for first, second in itertools.combinations(masks, 2):
        assert 0.4 < (first == second).float().mean() < 0.6


def test_masks_follow_the_rows_of_the_step() -> None:
    """Chunks of a head, sequences run one at a time and packs of one step: each row its own mask, wherever it is."""
    whole = Spans((Span(0, 512, 0, seed=7),))
    chunks = [mask(whole.within(start, start + 256)) for start in (0, 256)]
    assert torch.equal(torch.cat(chunks), mask(whole))
    assert 0.4 < (chunks[0] == chunks[1]).float().mean() < 0.6
    alone = mask(whole.take(range(10, 20)))
    assert torch.equal(alone, mask(whole)[10:20])
    scattered = [3, 4, 90, 400]
    assert torch.equal(mask(whole.take(scattered)), mask(whole)[scattered])
    pack = Spans((Span(0, 30, 0, seed=7),), Rows(torch.arange(100, 130)))
    assert torch.equal(mask(pack), mask(whole)[100:130])
    assert torch.equal(mask(pack.take([1, 5]).within(1, 2)), mask(whole)[105:106])


def test_without_a_seed_or_a_probability_x_is_itself() -> None:
    x, group = torch.ones(5, 64), Group("g", ())
    for spans, probability in ((Spans((Span(0, 5, 0),)), 0.5), (Spans((Span(0, 5, 0, seed=3),)), 0.0)):
        assert drop(x, group, 0, slot(probability), spans, spans.items[0]) is x
