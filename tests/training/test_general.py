"""General text beside the data: how it is split and drawn, KL to the base, mixed rows, whatever the split."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import options_of, tiny_documents, tiny_model, tiny_samples

from postil.adapter import AdaptedModel, LoraConfig, attach
from postil.data import Sample
from postil.errors import RecipeError
from postil.kernels.layout import Layout, Span, Spans, positions_of
from postil.training import train
from postil.training.general import Documents, General, split_general
from postil.training.holding import CHUNK, BaseStates, kl_gradients
from postil.training.optimizer import AdapterWeights, FullWeights
from postil.training.step import gradients, steps_of


def base(context: int | None = None, end: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(context=context, tokenizer=SimpleNamespace(eos_token_id=end))


def document(row: int, length: int, start: int = 0) -> Sample:
    weights = np.ones(length, dtype=np.float32)
    weights[0] = 0
    return Sample(np.arange(start, start + length, dtype=np.int32), weights, row)


def tokens(windows: tuple[Sample, ...]) -> set[int]:
    return {int(token) for window in windows for token in window.ids}


# The split


def test_watched_and_held_windows_come_from_different_documents() -> None:
    documents = [document(row, 700, 1000 * row) for row in range(1, 8)]
    general = split_general(documents, options_of(general_tokens=100), base())
    assert general.documents == 7
    watched, held = tokens(general.watched), tokens(general.held)
    assert {token // 1000 for token in watched} | {token // 1000 for token in held} == set(range(1, 8))
    assert not {token // 1000 for token in watched} & {token // 1000 for token in held}
    assert {len(window.ids) for window in general.watched} == {512}
    assert {len(window.ids) for window in general.held} == {100}
    assert all(window.weights[0] == 0 and window.row == 0 for window in (*general.watched, *general.held))


def test_other_options_and_seeds_watch_the_same_text() -> None:
    documents = [document(row, 300, 1000 * row) for row in range(1, 8)]
    first = split_general(documents, options_of(), base()).watched
    second = split_general(documents, options_of(seed=4, kl_weight=1.0, general_tokens=10), base()).watched
    assert [window.ids.tolist() for window in first] == [window.ids.tolist() for window in second]


def test_fewer_windows_are_spread_over_their_half() -> None:
    documents = [document(row, 512, 1000 * row) for row in range(1, 13)]
    every = split_general(documents, options_of(), base()).watched
    some = split_general(documents, options_of(watch_windows=3), base()).watched
    assert len(every) == 6
    assert [window.ids[0] for window in some] == [every[index].ids[0] for index in (0, 2, 4)]


def test_a_base_with_a_short_context_is_watched_in_short_windows() -> None:
    general = split_general([document(1, 300), document(2, 300)], options_of(), base(context=64))
    assert {len(window.ids) for window in (*general.watched, *general.held)} == {64}


def test_pieces_of_one_row_stay_together_and_its_end_has_no_loss() -> None:
    pieces = [document(1, 60), document(1, 40, 60), document(2, 50)]
    general = split_general(pieces, options_of(general_tokens=128), base(end=99))
    (whole,) = next(part for part in (general.watched, general.held) if len(part[0].ids) == 100)
    assert whole.ids.tolist() == list(range(100))
    assert whole.weights[99] == 0  # the end of sequence
    assert whole.target_tokens == 97  # nor the first token of each piece


@pytest.mark.parametrize(
    ("documents", "options", "said"),
    [
        ([document(1, 1)], {}, "no document of two tokens or more to watch"),
        ([document(1, 90)], {"kl_weight": 1.0}, "there is 1 general document, and some must be watched"),
    ],
)
def test_too_little_text(documents: list[Sample], options: dict[str, float], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        split_general(documents, options_of(**options), base())


def test_options_that_need_text_say_so(model: AdaptedModel, samples: list[Sample]) -> None:
    for name in ("guard", "kl_weight", "general_share"):
        with pytest.raises(RecipeError, match=rf"training.{name} needs general rows: give general="):
            train(model, samples, **{name: 0.5})


def test_conversations_are_parted_and_stay_whole() -> None:
    chats = [document(row, 20 + row, 1000 * row) for row in range(1, 12)]
    given = Documents(prose=[document(1, 90), document(2, 90)], chat=chats)
    general = split_general(given, options_of(watch_windows=1), base())
    assert general.documents == 13
    assert len(general.chat_watched) == 3  # a quarter
    assert len(general.chat_held) == 8
    starts = [int(one.ids[0]) for one in (*general.chat_watched, *general.chat_held)]
    assert len(set(starts)) == 11
    many = Documents(chat=[document(row, 20, 1000 * row) for row in range(1, 40)])
    assert len(split_general(many, options_of(watch_windows=1), base()).chat_watched) == 4  # for each window
    whole = {int(one.ids[0]): len(one.ids) for one in chats}
    assert all(len(one.ids) == whole[int(one.ids[0])] and one.row == 0 for one in general.chat_held)
    alone = split_general(Documents(chat=chats), options_of(kl_weight=1.0), base())
    assert alone.watched == alone.held == ()
    assert set(alone.compared(options_of(kl_weight=1.0), 1)) == {"chat"}


def test_mixed_rows_are_of_both_kinds_by_turns() -> None:
    chats = [document(row, 20, 1000 * row) for row in range(1, 12)]
    given = Documents(prose=[document(1, 90, 100_000), document(2, 90, 200_000)], chat=chats)
    for share, counts in ((0.125, [(0, 1), (1, 0)]), (0.375, [(1, 2), (2, 1)]), (0.5, [(2, 2), (2, 2)])):
        options = options_of(general_share=share, general_tokens=10)
        general = split_general(given, options, base())
        found = []
        for step in (1, 2):
            rows = general.mixed(options, step)
            prose = sum(int(row.ids[0]) >= 100_000 for row in rows)
            found.append((prose, len(rows) - prose))
        assert found == counts


@pytest.mark.parametrize("share", [0.125, 0.375, 0.5])  # 1, 3 and 4 of 8 rows: odd ones are dealt by turns
def test_every_mixed_row_comes_once_before_any_comes_again(share: float) -> None:
    chats = [document(row, 20, 1000 * row) for row in range(1, 12)]
    given = Documents(prose=[document(1, 90, 100_000), document(2, 90, 200_000)], chat=chats)
    options = options_of(general_share=share, general_tokens=10)
    general = split_general(given, options, base())
    drawn = [int(row.ids[0]) for step in range(1, 41) for row in general.mixed(options, step)]
    for held, kind in (
        (general.held, [first for first in drawn if first >= 100_000]),
        (general.chat_held, [first for first in drawn if first < 100_000]),
    ):
        all_of = {int(row.ids[0]) for row in held}
        rounds = [set(kind[start : start + len(held)]) for start in range(0, len(kind) - len(held) + 1, len(held))]
        assert rounds
        assert all(found == all_of for found in rounds)


# The draw


def test_every_window_comes_once_before_any_comes_again() -> None:
    options = options_of(kl_weight=1.0, kl_rows=3, general_tokens=10)
    general = split_general([document(1, 200), document(2, 100)], options, base())
    count = len(general.held)
    assert count % 3  # the border between two rounds lies within a step
    drawn = [
        int(window.ids[0]) for step in range(1, count + 1) for window in general.compared(options, step)["prose"]
    ]
    rounds = [drawn[start : start + count] for start in range(0, 3 * count, count)]
    assert all(Counter(part) == Counter(rounds[0]) and len(set(part)) == count for part in rounds)
    assert all(one != other for one, other in pairwise(rounds))
    assert [int(window.ids[0]) for window in general.compared(options, 2)["prose"]] == drawn[3:6]


def test_general_rows_join_every_step_and_no_row_of_the_data_is_lost() -> None:
    samples, options = tiny_samples(), options_of(general_share=0.3, accumulation=2, general_tokens=16)
    general = split_general(tiny_documents(), options, base())
    steps = list(steps_of(samples, options, 0, 6, general))
    rows = [[row for pack in packs for row in pack.rows] for _, packs in steps]
    assert [step.count(0) for step in rows] == [2] * 6  # 0.3 of 8 rows
    own = sorted(row for step in rows[:3] for row in step if row)
    assert own == sorted(sample.row for sample in samples)
    (_, resumed), *_ = steps_of(samples, options, 4, 6, general)
    assert [pack.ids.tolist() for pack in resumed] == [pack.ids.tolist() for pack in steps[4][1]]
    assert not any(row == 0 for _, packs in steps_of(samples, options, 0, 6) for pack in packs for row in pack.rows)


# The gradient


def trained(model: AdaptedModel) -> AdapterWeights:
    resident = model.resident("default")
    weights = AdapterWeights.of(resident)
    generator = torch.Generator().manual_seed(7)
    resident.flat.add_(torch.randn(resident.flat.shape, generator=generator) * 0.1)
    return weights


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_kl_is_divided_by_its_own_tokens_and_any_split_gives_the_same(accumulation: int) -> None:
    model = tiny_model()
    attach(model, LoraConfig(r=4), seed=1)
    weights, resident = trained(model), model.resident("default")
    options = options_of(kl_weight=0.5, kl_rows=5, general_tokens=12, accumulation=accumulation)
    general = split_general(tiny_documents(), options, model.base)
    (mean,) = kl_gradients(
        model, weights, resident, general.compared(options, 1), options, 1, BaseStates(nullcontext)
    ).values()
    got = weights.grad.clone()
    weights.grad.zero_()
    rows = general.compared(options, 1)["prose"]
    ids = torch.from_numpy(np.concatenate([window.ids for window in rows])).long()
    layout = Layout.packed([12] * 5, Spans((Span(0, 60, resident.slot),)))
    targets = torch.cat([torch.arange(11) + 12 * index for index in range(5)])
    with model.using(layout):
        q = model.logits(model.hidden(ids, positions_of([12] * 5)), layout.spans).log_softmax(-1)
    with model.using(Layout.packed([12] * 5)), torch.no_grad():
        p = model.logits(model.hidden(ids, positions_of([12] * 5)), Spans()).log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)[targets].mean()
    (0.5 * expected).backward()
    assert got.abs().max() > 1e-4
    assert mean == pytest.approx(float(expected.detach()), rel=1e-4)
    torch.testing.assert_close(got, weights.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_a_step_with_everything_on_does_not_depend_on_the_split(accumulation: int) -> None:
    found = []
    for count in (1, accumulation):
        model = tiny_model()
        attach(model, LoraConfig(r=4, dropout=0.3), seed=1)
        weights, resident = trained(model), model.resident("default")
        options = options_of(accumulation=count, kl_weight=0.5, general_share=0.5, general_tokens=12)
        general = split_general(tiny_documents(), options, model.base)
        _, packs = next(steps_of(tiny_samples(), options, 0, 1, general))
        assert len(packs) == count
        gradients(model, weights, resident, packs, options, 1)
        kl_gradients(model, weights, resident, general.compared(options, 1), options, 1, BaseStates(nullcontext))
        found.append(weights.grad.clone())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)


def test_full_fine_tuning_is_held_to_the_weights_it_began_with() -> None:
    model = tiny_model()
    weights = FullWeights.of(model.model)
    bare = weights.origin()
    options = options_of(method="full", kl_weight=1.0, general_tokens=12)
    rows = split_general(tiny_documents(), options, model.base).compared(options, 1)
    assert kl_gradients(model, weights, None, rows, options, 1, BaseStates(bare)) == {
        "prose": pytest.approx(0, abs=1e-6)
    }
    assert weights.grad.abs().max() < 1e-5
    began = weights.flat.clone()
    weights.flat.add_(torch.randn(began.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    weights.publish()
    moved = [parameter.detach().clone() for parameter in model.model.parameters()]
    far = kl_gradients(model, weights, None, rows, options, 1, BaseStates(bare))["prose"]
    assert far > 0.01
    assert all(torch.equal(one, other) for one, other in zip(moved, model.model.parameters(), strict=True))
    weights.flat.sub_(weights.grad, alpha=0.01 / float(weights.grad.norm()))
    weights.publish()
    assert kl_gradients(model, weights, None, rows, options, 1, BaseStates(bare))["prose"] < far


def test_every_compared_token_weighs_the_same_whatever_its_kind() -> None:
    grads, means = {}, {}
    for kinds in (("prose",), ("chat",), ("prose", "chat")):
        model = tiny_model()
        attach(model, LoraConfig(r=4), seed=1)
        weights, resident = trained(model), model.resident("default")
        options = options_of(kl_weight=0.5, kl_rows=2, general_tokens=12)
        given = Documents(prose=tiny_documents(), chat=tiny_samples())
        drawn = split_general(given, options, model.base).compared(options, 1)
        rows = {kind: drawn[kind] for kind in kinds}
        tokens = {kind: sum(row.target_tokens for row in drawn[kind]) for kind in drawn}
        means[kinds] = kl_gradients(model, weights, resident, rows, options, 1, BaseStates(nullcontext))
        grads[kinds] = weights.grad.clone()
    assert means["prose", "chat"] == pytest.approx(means["prose",] | means["chat",], rel=1e-4)
    assert tokens["prose"] != tokens["chat"]
    both = tokens["prose"] * grads["prose",] + tokens["chat"] * grads["chat",]
    torch.testing.assert_close(grads["prose", "chat"], both / sum(tokens.values()), rtol=1e-3, atol=1e-6)


def test_the_bases_states_are_computed_once_and_only_while_there_is_room() -> None:
    model = tiny_model()
    attach(model, LoraConfig(r=4), seed=1)
    trained(model)
    rows = tiny_documents(CHUNK + 2, 20)
    stranger = tiny_samples()[0]
    states = BaseStates(nullcontext, rows, room=sum(row.target_tokens for row in rows[:CHUNK]) * 32 * 4)
    for row in (rows[1], rows[-1], stranger):
        with torch.no_grad(), model.using(Layout.packed([len(row.ids)])):
            plain = model.hidden(torch.from_numpy(row.ids).long(), positions_of([len(row.ids)]))
        torch.testing.assert_close(states.of(model, row), plain[np.flatnonzero(row.weights) - 1])
    assert all(states.of(model, row) is states.of(model, row) for row in rows[:CHUNK])
    for row in (rows[-1], stranger):  # no room is left, and no use to keep it
        assert states.of(model, row) is not states.of(model, row)
        assert torch.equal(states.of(model, row), states.of(model, row))
    other = BaseStates(nullcontext, rows, room=states.room)  # asked in another order: the same bits
    assert all(torch.equal(other.of(model, row), states.of(model, row)) for row in reversed(rows))


def test_the_base_is_run_over_no_more_than_a_pack_or_one_row_for_its_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    rows = tiny_documents(CHUNK + 4, 20)
    asked: list[int] = []

    def counting(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        asked.append(len(ids))
        return AdaptedModel.hidden(model, ids, positions)

    monkeypatch.setattr(model, "hidden", counting)
    states = BaseStates(nullcontext, rows, pack_tokens=70)
    for _ in range(2):
        for row in rows:
            states.of(model, row)
    assert asked == [60] * 6 + [40]  # three rows of 20 tokens at a time, and nothing twice
    asked.clear()
    states = BaseStates(nullcontext, rows, room=0)
    states.of(model, rows[0])
    assert asked == [20]  # not its neighbours, whose states no room is for
    long = BaseStates(nullcontext, rows, pack_tokens=16)
    assert len(long.of(model, rows[0])) == rows[0].target_tokens


def test_rows_that_begin_alike_are_held_to_as_if_they_did_not() -> None:
    """Under dropout the beginnings are not shared: with a dropout of next to nothing both ways must agree."""
    begin = np.arange(1, 25, dtype=np.int32)
    rows = []
    for n in range(4):
        ids = np.concatenate([begin, np.arange(30 + n, 40 + n, dtype=np.int32)])
        rows.append(Sample(ids, (np.arange(34) >= 27).astype(np.float32), 0))
    grads = []
    for dropout in (0.0, 1e-9):
        model = tiny_model()
        attach(model, LoraConfig(r=4, dropout=dropout), seed=1)
        weights, resident = trained(model), model.resident("default")
        options = options_of(kl_weight=0.5)
        kl_gradients(model, weights, resident, {"chat": rows}, options, 1, BaseStates(nullcontext))
        grads.append(weights.grad.clone())
    assert grads[0].abs().max() > 1e-4
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-6)


# Runs


def general_kl(**settings: float) -> tuple[float, list[dict[str, float]]]:
    model = tiny_model()
    attach(model, LoraConfig(r=4), seed=1)
    events: list[dict[str, float]] = []
    train(
        model, tiny_samples(), general=tiny_documents(), learning_rate=1e-2, epochs=8, schedule="constant",
        valid_every=24, watch=events.append, **settings,
    )  # fmt: skip
    return events[-1]["general_kl"], events


def test_kl_weight_and_general_rows_keep_the_base_nearer() -> None:
    free, events = general_kl(kl_weight=0)
    assert {"general_nats", "general_rise", "general_kl", "watch_seconds"} <= events[-1].keys()
    assert "kl_loss" not in events[-1]
    held, events = general_kl(kl_weight=2.0, general_tokens=24)
    assert 0 < events[-1]["kl_loss"] < 5
    mixed, _ = general_kl(kl_weight=0, general_share=0.5, general_tokens=24)
    assert free > 0.1
    assert held < 0.5 * free
    assert mixed < 0.8 * free


def test_what_is_done_with_the_text_is_said() -> None:
    general = General((document(1, 4),), (document(2, 4),), 6)
    watched, *steps = general.lines(options_of(guard=0.05, kl_weight=0.5, general_share=0.25))
    assert watched == (
        "general ability: 6 documents; 3 tokens of prose watched at each validation; "
        "no state more than 0.05 nats above the base is kept"
    )
    assert steps == [
        "each step: 0.5 × KL to the base over general rows, 2 of prose (64 tokens)",
        "each step: 2 general rows among its rows",
    ]
    both = General((document(1, 4),), (document(2, 4),), 6, (document(3, 9),), (document(4, 9),))
    watched, step = both.lines(options_of(kl_weight=0.5))
    assert "3 tokens of prose and 8 tokens of chat watched" in watched
    assert step == "each step: 0.5 × KL to the base over general rows, 2 of prose (64 tokens) and 2 of chat"
