"""The key-value store: rooms as each sequence needs them, kept rows moved whole, and a bound on all of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import deterministic

from postil.engine.cache import ROUND, KeyValueStore
from postil.errors import InternalError


class Written:
    """A store beside plain lists of what each sequence wrote, one number a token."""

    def __init__(self) -> None:
        self.store = KeyValueStore()
        self.sequences: list[list[float]] = []
        self.number = 0.0

    def grow(self, tokens: list[int], limit: int = 4000) -> None:
        """Write so many new tokens of each sequence; those beyond the ones there are new."""
        used = [len(one) for one in self.sequences] + [0] * (len(tokens) - len(self.sequences))
        needed = [before + new for before, new in zip(used, tokens, strict=True)]
        self.store.reserve(used, needed, [limit] * len(tokens))
        self.sequences += [[] for _ in range(len(tokens) - len(self.sequences))]
        rows, values = [], []
        for n, (before, new) in enumerate(zip(used, tokens, strict=True)):
            rows += range(self.store.starts[n] + before, self.store.starts[n] + before + new)
            fresh = [self.number + i for i in range(1, new + 1)]
            self.sequences[n] += fresh
            values += fresh
            self.number += new
        self.store.write_rows = torch.tensor(rows, dtype=torch.int64)
        wide = torch.tensor(values).view(-1, 1, 1)
        for layer in (0, 1):
            self.store.extend(layer, wide + layer, -wide)

    def check(self) -> None:
        """Every sequence reads back what it wrote; no two rooms overlap; the bound holds."""
        self.store.write_rows = torch.zeros(0, dtype=torch.int64)
        nothing = torch.zeros(0, 1, 1)
        for layer in (0, 1):
            keys, values = self.store.extend(layer, nothing, nothing)
            assert len(keys) == len(values) <= self.store.rows
            for start, own in zip(self.store.starts, self.sequences, strict=True):
                assert (keys[start : start + len(own), 0, 0] - layer).tolist() == own
                assert (-values[start : start + len(own), 0, 0]).tolist() == own
        rooms = sorted(zip(self.store.starts, self.store.rooms, strict=True))
        assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(rooms))
        assert all(room >= len(own) for room, own in zip(self.store.rooms, self.sequences, strict=True))


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """As in the tests of the kernels: what is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]


STEPS = st.lists(
    st.one_of(
        st.lists(st.integers(1, 150), min_size=1, max_size=4).map(lambda new: ("new", new)),
        st.tuples(st.just("grow"), st.integers(1, 90)),
        st.tuples(st.just("keep"), st.randoms(use_true_random=False)),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_what_was_written_is_kept_whatever_grows_comes_and_goes(steps: list[tuple[str, object]]) -> None:
    written, most = Written(), 0
    for kind, given_ in steps:
        count = len(written.sequences)
        if kind == "new":
            written.grow([1] * count + given_)  # type: ignore[operator]
        elif kind == "grow" and count:
            written.grow([given_ * (n % 2) + 1 for n in range(count)])  # type: ignore[operator]
        elif kind == "keep" and count:
            kept = given_.sample(range(count), given_.randint(0, count))  # type: ignore[attr-defined]
            written.store.keep(kept)
            written.sequences = [written.sequences[n] for n in kept]
        most = max(most, sum(written.store.rooms))
        if written.store.rows:
            written.check()
    assert written.store.rows <= most * 5 // 4


def test_one_long_sequence_does_not_make_the_others_as_long() -> None:
    written = Written()
    written.grow([3000, *[16] * 31])
    assert written.store.rows <= 1.25 * (3008 + 31 * ROUND)  # where 32 times the longest were 96,000
    written.grow([1] * 32)
    assert written.store.rows <= 1.25 * (3008 + 31 * ROUND)


def test_a_room_is_never_larger_than_its_sequence_will_be() -> None:
    store = KeyValueStore()
    store.reserve([0, 0], [60, 100], [70, 1000])
    store.reserve([60, 100], [65, 129], [70, 1000])
    assert store.rooms == [2 * ROUND, 4 * ROUND]  # 70 rounded up; twice 128
    with pytest.raises(InternalError, match="135 tokens came where 70 was its limit"):
        store.reserve([65, 129], [135, 130], [70, 1000])
