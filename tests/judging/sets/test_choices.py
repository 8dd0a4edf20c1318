"""Choices and pairs: scored as by hand, token by token from the first, by what an option is long, and blanks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from postil.adapter import AdaptedModel
from postil.base import Base
from postil.errors import DataError
from postil.judging.asking.likelihoods import option_samples
from postil.judging.options import GeneralOptions
from postil.judging.sets.general import General, measure, read_general

Hand = Callable[..., torch.Tensor]
CHOICES = [
    {"context": f"What is {n}?", "choices": ["one", "two of them", "3", "ÄÖÜß"], "answer": n % 4} for n in range(16)
]
PAIRS = [
    {"good": f"Cats {word} sleep.", "bad": f"Cats sleep {word}."}
    for word in ("do", "can", "may", "will", "must", "never", "often", "now", "here", "so", "still", "too")
]
OPTIONS = GeneralOptions()


def nats_of(log_probs: Hand, model: AdaptedModel, weights: Any, context: str, text: str) -> list[float]:
    """Nats of each byte of a continuation; without a context after the end of a text."""
    tokenizer = model.base.tokenizer
    before = tokenizer(context)["input_ids"] if context else [tokenizer.eos_token_id]
    ids = [*before, *tokenizer(text)["input_ids"]]
    logs = log_probs(model, ids, weights)
    return [-float(logs[t - 1, ids[t]]) for t in range(len(before), len(ids))]


@pytest.mark.parametrize("weights", [None, {"note": 1.0}])
def test_choices_and_pairs_are_right_as_by_hand(model: AdaptedModel, log_probs: Hand, weights: Any) -> None:
    found = measure(read_general(None, CHOICES, PAIRS, model.base, OPTIONS, 0), model, weights).parts
    by: dict[str, list[bool]] = {}
    for row in CHOICES:
        nats = [nats_of(log_probs, model, weights, f"Question: {row['context']}\nAnswer:", f" {one}")
                for one in row["choices"]]  # fmt: skip
        sizes = {
            "accuracy": [1] * 4,
            "accuracy_per_token": list(map(len, nats)),
            "accuracy_per_character": [3, 11, 1, 4],
            "accuracy_per_byte": [3, 11, 1, 8],
        }
        for name, sized in sizes.items():
            best = min(range(4), key=lambda n: sum(nats[n]) / sized[n])
            by.setdefault(name, []).append(best == row["answer"])
    assert {name: stats.tolist() for name, stats in found["choices"].items()} == {
        name: [[100.0 * one, 1.0] for one in right] for name, right in by.items()
    }
    assert len({tuple(right) for right in by.values()}) > 2
    pairs = [
        sum(nats_of(log_probs, model, weights, "", f" {row['good']}"))
        < sum(nats_of(log_probs, model, weights, "", f" {row['bad']}"))
        for row in PAIRS
    ]
    assert found["pairs"]["accuracy"].tolist() == [[100.0 * one, 1.0] for one in pairs]
    assert 0 < sum(pairs) < len(pairs)


def test_the_first_token_of_a_sentence_is_scored(base: Base) -> None:
    tokenizer = base.tokenizer
    ((good, bad),), left_out = option_samples([[("", "Who went?"), ("", "x")]], tokenizer, 10)
    assert left_out == []
    assert good.ids.tolist() == [tokenizer.eos_token_id, *tokenizer("Who went?")["input_ids"]]
    assert good.weights.tolist() == [0] + [1] * 9
    assert bad.weights.tolist() == [0, 1]  # a single token is a target too
    assert option_samples([[("", "Who went?"), ("", "x")]], tokenizer, 9) == ([], [0])
    with_bos = copy.deepcopy(tokenizer)
    with_bos.bos_token = "<|im_start|>"
    (((good, _),), _) = option_samples([[("", "Who went?"), ("", "x")]], with_bos, None)
    assert good.ids[0] == with_bos.bos_token_id != tokenizer.eos_token_id
    neither = copy.deepcopy(tokenizer)
    neither.eos_token = None
    (((good, _),), _) = option_samples([[("", "Who went?"), ("", "xy")]], neither, None)
    assert good.weights.tolist() == [0] + [1] * 8  # nothing can stand before it


def asked(general: General, base: Base) -> list[tuple[str, str]]:
    """(context, scored text) of the second option of each question."""
    tokenizer, out = base.tokenizer, []
    for question in general.sets["choices"].samples:
        ids, weights = question[1].ids, question[1].weights
        out.append((tokenizer.decode(ids[weights == 0]), tokenizer.decode(ids[weights > 0])))
    return out


def blank(context: str, **more: Any) -> dict[str, Any]:
    return {"context": context, "choices": ["Ann", "Bo"], "answer": 1, **more}


ANN, WINNER = "Ann thanked Bo because _ had helped.", "The winner was _."
CODE = "What does `for _ in range(3): f()` do?"


def test_a_file_of_blanks_is_filled_and_the_rest_is_scored(model: AdaptedModel, log_probs: Hand) -> None:
    found = read_general(None, [blank(ANN), blank(WINNER)], None, model.base, OPTIONS, 0)
    wanted = [("Ann thanked Bo because Bo", " had helped."), ("The winner was", " Bo.")]
    assert asked(found, model.base) == wanted
    assert any(note.startswith("choices: in 2 questions each choice fills the blank `_`") for note in found.notes)
    losses = measure(found, model, None).options["choices"]
    for (context, text), question in zip(wanted, losses, strict=True):
        nats = nats_of(log_probs, model, None, context, text)
        assert question[1] == (pytest.approx(sum(nats), rel=1e-5), len(nats))


def test_a_lone_underscore_is_no_blank_unless_the_row_or_the_whole_file_says_so(base: Base) -> None:
    def read(*rows: dict[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
        found = read_general(None, rows, None, base, OPTIONS, 0)
        return asked(found, base), [note for note in found.notes if "chance" not in note]

    plain = "Question: {}\nAnswer:".format
    texts, (note,) = read(blank(CODE), blank("What is 2?"), blank("The ____ of it"))
    assert texts == [(plain(CODE), " Bo"), (plain("What is 2?"), " Bo"), (plain("The ____ of it"), " Bo")]
    assert note.startswith("choices: 1 contexts hold one lone `_` and are asked as they stand")
    texts, notes = read(blank(CODE, cloze=False), blank(ANN, cloze=True), blank(WINNER))
    assert texts == [(plain(CODE), " Bo"), ("Ann thanked Bo because Bo", " had helped."), (plain(WINNER), " Bo")]
    assert ["1 questions" in notes[0], "1 contexts" in notes[1]] == [True, True]
    assert read(blank(CODE, cloze=False)) == ([(plain(CODE), " Bo")], [])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            blank("Nothing to fill", cloze=True),
            "the given rows, row 1: `cloze` is true, and the context does not hold one",
        ),
        (blank("_ and _", cloze=True), "`cloze` is true, and the context does not hold one `_` to fill"),
        (blank(ANN, cloze="yes"), "`cloze` must be true or false, found 'yes'"),
    ],
)
def test_a_blank_that_is_none_is_named(row: dict[str, Any], said: str, base: Base) -> None:
    with pytest.raises(DataError, match=said):
        read_general(None, [row], None, base, OPTIONS, 0)


def test_equal_likelihoods_are_no_right_answer(model: AdaptedModel) -> None:
    rows = [{"context": "What?", "choices": ["same", "same"], "answer": 0}]
    found = measure(read_general(None, rows, None, model.base, OPTIONS, 0), model, None)
    assert found.parts["choices"]["accuracy"].tolist() == [[0.0, 1.0]]
