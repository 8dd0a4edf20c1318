"""What is chosen where nothing is given: from rows and tokens alone, never over what is given, and reproduced."""

from __future__ import annotations

import pytest
from tiny import tiny_documents, tiny_model, tiny_samples

from postil.adapter import LoraConfig, attach
from postil.errors import RecipeError
from postil.training import TrainOptions, train
from postil.training.defaults import HELD, MOST_EPOCHS, chosen, settled
from postil.training.general import General
from postil.training.options import CHOSEN


def updates(rows: int, method: str = "lora") -> int:
    found = chosen(rows, 10 * rows, 50, method)
    return found.epochs * -(-rows // found.batch_size)


def test_few_rows_are_seen_several_times_and_many_once() -> None:
    assert [chosen(rows, 10 * rows, 50, "lora").epochs for rows in (20, 150, 400, 1_000, 3_000, 10**6)] == [
        10, 10, 7, 3, 1, 1
    ]  # fmt: skip
    assert all(280 <= updates(rows) <= 420 for rows in (280, 400, 500, 700, 1_000, 1_400, 2_800))
    assert chosen(20, 200, 50, "full").epochs == MOST_EPOCHS["full"] < MOST_EPOCHS["lora"]
    assert chosen(400, 4_000, 50, "lora", batch_size=2).epochs < 7  # more updates an epoch: fewer epochs


def test_the_rate_falls_with_the_rows_and_full_fine_tunings_is_its_own() -> None:
    sizes = (10, 2_000, 5_000, 20_000, 50_000, 10**7)
    rates = [chosen(rows, 10 * rows, 50, "lora").learning_rate for rows in sizes]
    assert rates[:2] == [1e-3, 1e-3]
    assert rates[4:] == [2e-4, 2e-4]
    assert rates == sorted(rates, reverse=True)
    assert len({chosen(rows, 10 * rows, 50, "qlora").learning_rate for rows in sizes}) == 4
    assert {chosen(rows, 10 * rows, 50, "full").learning_rate for rows in sizes} == {2e-5}


def test_what_is_held_to_its_base_bears_a_higher_rate_and_needs_fewer_epochs() -> None:
    found = [chosen(rows, 10 * rows, 50, "lora", held=True) for rows in (20, 150, 500, 2_000, 50_000)]
    assert [one.learning_rate for one in found] == [2e-3, 2e-3, 2e-3, 1e-3, 2e-4]
    assert [one.epochs for one in found] == [5, 5, 5, 1, 1]
    assert chosen(150, 900, 50, "full", held=True) == chosen(150, 900, 50, "full")
    now, _ = settled(TrainOptions(kl_weight=0.5), tiny_samples(), tiny_samples(6))
    assert (now.learning_rate, now.epochs) == (2e-3, 5)


def test_a_run_stops_early_only_where_rows_come_again_and_some_are_held_out() -> None:
    assert chosen(150, 900, 50, "lora", held_out=8).patience > 0
    assert chosen(150, 900, 50, "lora").patience == 0
    assert chosen(150, 900, 50, "lora", held_out=8, epochs=1).patience == 0
    assert chosen(150, 900, 50, "lora", held_out=8, steps=10).patience == 0
    assert chosen(150, 900, 50, "lora", held_out=8, guarded=True).patience == 0
    assert chosen(10**5, 10**6, 50, "lora", held_out=8).patience == 0


def test_what_is_given_stays() -> None:
    given = {"learning_rate": 3e-5, "epochs": 2, "batch_size": 5, "warmup": 7, "valid_every": 4, "valid_rows": 3,
             "patience": 0, "kl_weight": 0.25}  # fmt: skip
    assert set(given) == set(CHOSEN)
    now, why = settled(TrainOptions(**given), tiny_samples(), tiny_samples(6))
    assert {key: getattr(now, key) for key in given} == given
    assert why == ()
    for key, value in given.items():
        now, why = settled(TrainOptions(**{key: value}), tiny_samples(), tiny_samples(6))
        assert getattr(now, key) == value
        assert f"chosen from the data: {'learning rate, ' if key != 'learning_rate' else ''}" in why[0]
    assert settled(now, tiny_samples(), tiny_samples(6)) == (now, ())  # once chosen, chosen


def test_an_adapter_is_held_to_general_rows_where_there_are_some() -> None:
    samples = tiny_samples()
    rows = tuple(tiny_samples(4))
    for general in (General(rows[:2], rows[2:], 4), General((), (), 4, rows[:2], rows[2:])):
        assert settled(TrainOptions(), samples, (), general)[0].kl_weight == HELD
        assert settled(TrainOptions(method="full"), samples, (), general)[0].kl_weight == 0
        assert settled(TrainOptions(kl_weight=0), samples, (), general)[0].kl_weight == 0
    assert settled(TrainOptions(), samples)[0].kl_weight == 0
    watched_alone = General(rows, (), 1)
    assert settled(TrainOptions(), samples, (), watched_alone)[0].kl_weight == 0


def test_auto_is_what_nothing_is() -> None:
    assert TrainOptions(**dict.fromkeys(CHOSEN, "auto")) == TrainOptions()
    with pytest.raises(RecipeError, match=r"training: epochs: .*'automatic'"):
        TrainOptions(epochs="automatic")


def test_the_epochs_of_so_many_steps() -> None:
    now, why = settled(TrainOptions(steps=7), tiny_samples(), tiny_samples(6))
    assert (now.epochs, now.total_steps(23), now.patience) == (3, 7, 3)
    assert why[0].startswith("chosen from the data: learning rate, batch size; 23 rows of")


def test_pythons_train_chooses_as_the_command_does_and_the_card_says_so() -> None:
    model = tiny_model()
    attach(model, LoraConfig(r=4), seed=1)
    events: list[dict[str, float]] = []
    adapter = train(model, tiny_samples(), valid=tiny_samples(4, seed=5), general=tiny_documents(),
                    watch=events.append, patience=0)  # fmt: skip
    assert adapter is not None
    kept = adapter.card["recipe"]["training"]
    assert (kept["learning_rate"], kept["epochs"], kept["batch_size"]) == (2e-3, 5, 8)
    assert kept["kl_weight"] == HELD
    assert len(events) == 15
    assert sum("valid_loss" in event for event in events) == -(-15 // kept["valid_every"])
    assert ["general_rise" in event for event in events] == [False] * 14 + [True]  # no guard: the last look alone
