"""Validation takes about a tenth of a run: by counting tokens, on rows that are spread over the prompts."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import tiny_model, tiny_samples

from postil.adapter import LoraConfig, attach
from postil.data import Sample
from postil.training import train
from postil.training.validation import FEWEST_ROWS, MOST, WATCHED, measured, spread, validations

ROW = 50  # tokens


def cost(rows: int, epochs: int, held_out: int, watched: int = 0) -> float:
    """The share of a run's time that its validations take, a learned token costing two that are measured."""
    steps = -(-rows * epochs // 8)
    plan = validations(rows * epochs * ROW, steps, [ROW] * held_out, watched)
    times = -(-steps // plan.every)
    spent = times * (plan.rows * ROW + watched)
    return spent / (spent + 2 * rows * epochs * ROW)


@pytest.mark.parametrize("epochs", [1, 2, 10])
@pytest.mark.parametrize("rows", [150, 1_000, 20_000])
@pytest.mark.parametrize("held_out", [1, 8, 30, 500, 5_000])
@pytest.mark.parametrize("watched", [0, 4096])
def test_it_takes_about_a_tenth(rows: int, epochs: int, held_out: int, watched: int) -> None:
    assert cost(rows, epochs, held_out, watched) < (0.11 if watched * 5 < rows * epochs * ROW else 0.3)


def test_a_hundred_and_fifty_rows_are_not_validated_at_every_step() -> None:
    plan = validations(150 * ROW, 19, [ROW] * 30)  # nineteen validations took half of the run
    assert (plan.rows, plan.every) == (30, 19)
    assert validations(10 * 142 * ROW, 180, [ROW] * 8) == validations(10 * 142 * ROW, 180, [ROW] * 8, 0)
    assert validations(10 * 142 * ROW, 180, [ROW] * 8).every == 18


def test_many_held_out_rows_are_measured_in_part_and_few_whole() -> None:
    assert validations(10**6, 1_000, [ROW] * FEWEST_ROWS).rows == FEWEST_ROWS
    large = validations(10**6, 1_000, [ROW] * 5_000)
    assert FEWEST_ROWS < large.rows < 5_000
    assert large.every == 1_000 // MOST
    assert validations(1_000, 10, [ROW] * 5_000).rows == FEWEST_ROWS


def test_a_guard_has_states_to_choose_among() -> None:
    assert validations(150 * ROW, 19, [ROW] * 8, 4_096).every == 19
    assert validations(150 * ROW, 19, [ROW] * 8, 4_096, guarded=True).every == -(-19 // WATCHED)


def test_what_is_given_stays() -> None:
    assert validations(10**6, 1_000, [ROW] * 5_000, rows=5_000).rows == 5_000
    assert validations(10**6, 1_000, [ROW] * 5_000, rows=2_000).every == 500  # so many rows, so much rarer
    every = validations(10**6, 1_000, [ROW] * 5_000, every=10)
    assert every.every == 10
    assert every.rows < validations(10**6, 1_000, [ROW] * 5_000).rows  # so often, so many fewer
    assert validations(10, 3, [], rows=7) == validations(10, 3, [])


def prompted(count: int, prompts: int) -> list[Sample]:
    """Rows whose prompts come in blocks, as files that are sorted have them."""
    out = []
    for row in range(count):
        ids = np.array([row * prompts // count, 1, 2, row % 50], dtype=np.int32)
        out.append(Sample(ids, np.array([0, 0, 0, 1], dtype=np.float32), row + 1))
    return out


def test_the_measured_rows_are_the_same_ones_and_spread_over_prompts() -> None:
    samples = prompted(400, 20)
    kept = measured(samples, 40)
    assert [sample.row for sample in kept] == sorted(sample.row for sample in kept)
    found = [int(sample.ids[0]) for sample in kept]
    assert all(found.count(prompt) == 2 for prompt in range(20))
    assert [sample.row for sample in measured(prompted(400, 20), 40)] == [sample.row for sample in kept]
    uneven = prompted(40, 1) + [
        Sample(sample.ids + 1, sample.weights, 41 + n) for n, sample in enumerate(prompted(3, 3))
    ]
    assert {int(sample.ids[0]) for sample in measured(uneven, 4)} == {0, 1, 2, 3}
    assert measured(samples, 400) == samples
    assert sorted(sample.row for sample in spread(samples)) == list(range(1, 401))


def test_a_run_measures_the_chosen_rows_as_often_as_was_chosen() -> None:
    model = tiny_model()
    attach(model, LoraConfig(r=4), seed=1)
    events: list[dict[str, float]] = []
    adapter = train(model, tiny_samples(), valid=tiny_samples(60, seed=5), epochs=4, watch=events.append)
    assert adapter is not None
    kept = adapter.card["recipe"]["training"]
    assert kept["valid_rows"] == FEWEST_ROWS
    steps = [event["step"] for event in events if "valid_loss" in event]
    assert steps == [step for step in range(1, 13) if step % kept["valid_every"] == 0 or step == 12]
    assert len(steps) < 4
    assert adapter.card["data"]["held_out"] == 60
