"""Two adapters side by side: the numbers are those of each alone, and the base is left as it was."""

from __future__ import annotations

from typing import Any

import pytest

from postil.adapter import Adapter, attach
from postil.adapter.shrink import shrink
from postil.base import Base, live_digest
from postil.data import load_data
from postil.judging.asking.likelihoods import mean_nats, row_losses
from postil.judging.between import between
from postil.judging.options import GeneralOptions

ROWS = [{"prompt": f"Say {n}", "completion": "yes " * (n % 3 + 1)} for n in range(12)]
TEXT = [{"text": "The margin of an old book holds more than its text. " * 4}]
SHORT = GeneralOptions(window=64)


def test_numbers_are_those_of_each_adapter(base: Base, note: Adapter) -> None:
    before = live_digest(base.model)
    small = shrink(note, rank=1).adapter
    found = between(base, note, small, target=ROWS, general=TEXT, options=SHORT)
    assert set(found) == {"target", "general"}
    assert live_digest(base.model) == before
    samples = load_data(ROWS, base).samples
    model = attach(attach(base), note, name="a")
    attach(model, small, name="b")
    for name, estimate in (("a", found["target"].base), ("b", found["target"].adapter)):
        assert estimate.value == pytest.approx(mean_nats(row_losses(model, samples, name)), rel=1e-6)
    assert found["target"].rows == len(ROWS)
    assert found["target"].better == "lower"


def test_an_adapter_equals_itself(base: Base, note: Adapter) -> None:
    (found,) = between(base, note, shrink(note, rank=4).adapter, general=TEXT, options=SHORT).values()
    assert found.difference.value == pytest.approx(0, abs=1e-6)


def test_rows_are_read_as_the_recipe_read_its_own(base: Base, note: Adapter) -> None:
    card: dict[str, Any] = {"recipe": {"rows": {"format": "raw"}}}
    raw = Adapter(note.config, note.tensors, card=card)
    first = between(base, raw, raw, target=ROWS)["target"]
    second = between(base, note, note, target=ROWS)["target"]
    assert first.base.value != second.base.value
