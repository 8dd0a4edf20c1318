"""Likelihoods: of each row alone whatever its pack, of options as by hand, windows of text, and the token KL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from postil.adapter import AdaptedModel, Adapter, attach
from postil.base import Base
from postil.data import Sample
from postil.errors import AdapterError
from postil.judging.asking import likelihoods as scoring
from postil.judging.asking.likelihoods import (
    mean_nats,
    nats_and_kl,
    option_losses,
    option_samples,
    row_losses,
    token_scores,
    windows,
)
from postil.judging.sets.read import shipped_text

Hand = Callable[..., torch.Tensor]


@pytest.fixture
def samples() -> list[Sample]:
    random = np.random.default_rng(0)
    out = []
    for row in range(9):
        length = int(random.integers(3, 17))
        weights = (random.random(length) < 0.6).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        out.append(Sample(random.integers(0, 61, length).astype(np.int32), weights, row + 1))
    return out


@pytest.mark.parametrize("weights", [None, "note", {"note": 1.0}, {"note": 0.5}])
def test_row_losses_are_those_of_each_row_alone(
    model: AdaptedModel, samples: list[Sample], log_probs: Hand, monkeypatch: pytest.MonkeyPatch, weights: Any
) -> None:
    monkeypatch.setattr(scoring, "PACK_TOKENS", 40)  # several packs
    told: list[int] = []
    found = row_losses(model, samples, weights, told.append)
    assert sum(told) == len(samples)
    for sample, (total, count) in zip(samples, found, strict=True):
        logs = log_probs(model, sample.ids, {"note": 1.0} if weights == "note" else weights)
        wanted = [-float(logs[t - 1, sample.ids[t]]) for t in range(1, len(sample.ids)) if sample.weights[t]]
        assert count == len(wanted)
        assert total == pytest.approx(sum(wanted), rel=1e-5)


def alike(tails: list[list[int]], prompt: int, seed: int = 0) -> list[Sample]:
    """Rows with one prompt, each with its own answer."""
    random = np.random.default_rng([seed, prompt])
    head = random.integers(0, 61, prompt)
    return [
        Sample(
            np.array([*head, *tail], dtype=np.int32), np.repeat([0.0, 1.0], [prompt, len(tail)]).astype(np.float32), 1
        )
        for tail in tails
    ]


@pytest.mark.parametrize("budget", [12, 40, 2048])
def test_rows_with_one_prompt_have_the_losses_of_each_alone(
    model: AdaptedModel, samples: list[Sample], log_probs: Hand, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(scoring, "PACK_TOKENS", budget)
    rows = [
        *alike([[4, 5], [4, 5], [7], [9, 1, 2, 3]], 12), *samples[:2], *alike([[3], [5]], 1),
        *alike([[8]], 19, seed=1), *alike([[8, 2], [1]], 19, seed=2), *alike([[6, 6]], 19, seed=2),
    ]  # fmt: skip
    longer = np.array([*rows[0].ids[:11], *range(20, 32)], dtype=np.int32)  # another question after the same examples
    for tail in ([5], [6, 7]):
        rows.append(Sample(np.array([*longer, *tail], dtype=np.int32), np.array([0.0] * 23 + [1.0] * len(tail)), 1))
    rows.append(alike([[9]], 12)[0])
    scores = token_scores(model, rows, "note")
    for sample, (total, count), (nats, greedy) in zip(rows, row_losses(model, rows, "note"), scores, strict=True):
        logs = log_probs(model, sample.ids, {"note": 1.0})
        targets = [t for t in range(1, len(sample.ids)) if sample.weights[t]]
        assert count == len(targets)
        assert total == pytest.approx(-sum(float(logs[t - 1, sample.ids[t]]) for t in targets), rel=1e-5)
        assert nats == pytest.approx(total, rel=1e-5)
        assert greedy == all(int(logs[t - 1].argmax()) == sample.ids[t] for t in targets)


def test_a_prompt_of_several_rows_is_computed_once(model: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    hidden = AdaptedModel.hidden

    def counting(self: AdaptedModel, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        seen.append(len(ids))
        return hidden(self, ids, positions)

    monkeypatch.setattr(AdaptedModel, "hidden", counting)
    row_losses(model, alike([[4, 5], [7], [9]], 20), None)
    assert seen == [19 + 3 + 2 + 2]  # the last token of the prompt predicts each answer's first
    first, second = alike([[4], [5]], 30), alike([[4], [5]], 30)
    for sample in second:  # another question after twelve equal tokens
        sample.ids[12:30] = 1
    row_losses(model, [*first, *second], None)
    assert seen[1:] == [12 + 2 * (17 + 2 + 2)]


@pytest.mark.parametrize("share", [False, True])
def test_packs_keep_to_their_budget(monkeypatch: pytest.MonkeyPatch, share: bool) -> None:
    """Also where a beginning cannot be shared, and so stands in the pack again and again."""
    monkeypatch.setattr(scoring, "PACK_TOKENS", 64)
    groups = list(scoring._budgeted(alike([[1]] * 40, 20), share))
    sizes = [len(scoring.pack_shared(group, share).pack.ids) for group in groups]
    assert sum(map(len, groups)) == 40
    assert max(sizes) <= 64
    assert len(groups) == (2 if share else 14)  # 19 + 22 · 2 tokens, and three of 21


def test_a_scale_of_nought_is_the_base_and_of_one_the_adapter(model: AdaptedModel, samples: list[Sample]) -> None:
    base, adapter = row_losses(model, samples, None), row_losses(model, samples, "note")
    assert row_losses(model, samples, {"note": 0.0}) == base
    assert row_losses(model, samples, {"note": 1.0}) == adapter
    half = mean_nats(row_losses(model, samples, {"note": 0.5}))
    assert len({round(mean_nats(base), 4), round(half, 4), round(mean_nats(adapter), 4)}) == 3


def test_mean_nats_weighs_by_tokens() -> None:
    assert mean_nats([(4.0, 1), (2.0, 5)]) == 1.0


def test_the_kl_is_that_of_the_two_distributions(
    model: AdaptedModel, samples: list[Sample], log_probs: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "PACK_TOKENS", 40)
    for sample, (total, count) in zip(samples, nats_and_kl(model, samples, "note")[1], strict=True):
        p, q = log_probs(model, sample.ids), log_probs(model, sample.ids, {"note": 1.0})
        rows = [t - 1 for t in range(1, len(sample.ids)) if sample.weights[t]]
        assert count == len(rows)
        assert total == pytest.approx(float((p.exp() * (p - q))[rows].sum()), rel=1e-4)
    assert all(total == 0 for total, _ in nats_and_kl(model, samples, None)[1])
    assert nats_and_kl(model, samples, "note")[0] == row_losses(model, samples, "note")  # to the last bit


def test_the_kl_to_another_model(make_base: Callable[..., Base], samples: list[Sample], log_probs: Hand) -> None:
    first, second = attach(make_base()), attach(make_base(seed=8))
    for sample, (total, _) in zip(samples, nats_and_kl(second, samples, None, first)[1], strict=True):
        p, q = log_probs(first, sample.ids), log_probs(second, sample.ids)
        rows = [t - 1 for t in range(1, len(sample.ids)) if sample.weights[t]]
        assert total == pytest.approx(float((p.exp() * (p - q))[rows].sum()), rel=1e-4)
    assert first.layout is second.layout is None


def test_windows_hold_the_text_once(tokenizer: Any) -> None:
    texts = ["abcdefghij", "klm"]  # 15 tokens with the blank line
    found = windows(tokenizer, texts, None, 6)
    assert [len(sample.ids) for sample in found] == [6, 6, 3]
    assert tokenizer.decode(np.concatenate([sample.ids for sample in found])) == "abcdefghij\n\nklm"
    assert [sample.target_tokens for sample in found] == [5, 5, 2]
    assert all(sample.weights[0] == 0 for sample in found)
    assert [len(sample.ids) for sample in windows(tokenizer, texts, 13, 6)] == [6, 6]  # a single token tells nothing


def test_windows_begin_with_the_tokenizers_own_first_token(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "leading_ids", lambda _: [256])
    found = windows(tokenizer, ["abcdefg"], None, 4)
    assert [sample.ids[0] for sample in found] == [256, 256, 256]
    assert [sample.target_tokens for sample in found] == [3, 3, 1]  # every token of the text is scored


def test_the_shipped_text_is_enough_and_tells_its_rows() -> None:
    rows = shipped_text()
    text = "".join(row.value["text"] for row in rows.rows)
    assert len(text) > 50_000
    assert len(text.encode()) < 200_000


def test_options_are_scored_on_their_continuation_alone(model: AdaptedModel, tokenizer: Any, log_probs: Hand) -> None:
    asked = [[("ask one:", " yes"), ("ask one:", " no")], [("", "whole line")]]
    samples, left_out = option_samples(asked, tokenizer, None)
    assert left_out == []
    for weights in (None, {"note": 1.0}):
        for question, losses in zip(asked, option_losses(model, samples, weights), strict=True):
            for (context, text), (total, count) in zip(question, losses, strict=True):
                before = tokenizer(context)["input_ids"] or [tokenizer.eos_token_id]  # what stands before any text
                ids = [*before, *tokenizer(text)["input_ids"]]
                logs = log_probs(model, ids, weights)
                first = len(before)
                wanted = [-float(logs[t - 1, ids[t]]) for t in range(first, len(ids))]
                assert (total, count) == (pytest.approx(sum(wanted), rel=1e-5), len(wanted))


def test_options_that_do_not_fit_take_their_question_with_them(tokenizer: Any) -> None:
    asked = [[("a", "b"), ("a", "c" * 9)], [("a", "b"), ("a", "c")], [("", "x"), ("", "")]]
    samples, left_out = option_samples(asked, tokenizer, 6)
    assert left_out == [0, 2]  # too long, and nothing to score
    assert [[len(sample.ids) for sample in question] for question in samples] == [[2, 2]]


def test_an_unknown_adapter_is_one_sentence(model: AdaptedModel, samples: list[Sample], note: Adapter) -> None:
    with pytest.raises(AdapterError, match=r"no adapter 'note2' is attached \(did you mean 'note'\?\)"):
        row_losses(model, samples, "note2")
