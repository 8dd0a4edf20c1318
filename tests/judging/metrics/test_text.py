"""Text measures: equal to sacrebleu's to the last bit, SQuAD's normalisation and F1, and empty references."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from postil.errors import JudgeError
from postil.judging.metrics import metric_named
from postil.judging.metrics.metric import Metric
from postil.judging.metrics.text import normalised

# sacrebleu's own example (its README): three sentences, two references each.
SAID = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [
    ["The dog bit the man.", "The dog had bit the man."],
    ["It was not unexpected.", "No one was surprised."],
    ["The man bit him first.", "The man had bitten the dog."],
]

words = st.sampled_from(["the", "dog", "bit", "a", "man", "3.5", "it's", "ärger", ",", ".", "(hi)", "The"])
sentence = st.lists(words, max_size=9).map(" ".join) | st.text(max_size=12)
filled = sentence.filter(str.strip)  # an empty reference is another matter than to sacrebleu
corpus = st.lists(st.tuples(sentence, st.lists(filled, min_size=1, max_size=4)), min_size=1, max_size=6)


def rows_of(references: list[list[str]]) -> list[dict[str, Any]]:
    return [{"references": texts} for texts in references]


def streams_of(references: list[list[str]]) -> list[list[str | None]]:
    """sacrebleu's shape: the first references of all rows, the second ones, …, None where a row has fewer."""
    most = max(map(len, references))
    return [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]


def value(metric: Metric, said: list[str], rows: list[dict[str, Any]]) -> float:
    return float(metric.value(metric.statistics(said, rows).sum(axis=0)))


def test_sacrebleus_own_example() -> None:
    assert value(metric_named("bleu"), SAID, rows_of(REFERENCES)) == pytest.approx(48.530827, abs=1e-6)
    assert (
        value(metric_named("bleu"), SAID, rows_of(REFERENCES))
        == BLEU().corpus_score(SAID, streams_of(REFERENCES)).score
    )


tokenizers = st.sampled_from(["13a", "intl", "char", "none"])
smoothings = st.sampled_from(["exp", "floor", "add-k", "none"])


@given(corpus, st.booleans(), tokenizers, smoothings)
def test_bleu_is_sacrebleus(rows: list[tuple[str, list[str]]], lowercase: bool, tokenize: str, smooth: str) -> None:
    said, references = [one for one, _ in rows], [texts for _, texts in rows]
    theirs = BLEU(lowercase=lowercase, tokenize=tokenize, smooth_method=smooth, force=True)
    ours = metric_named("bleu", {"lowercase": lowercase, "tokenize": tokenize, "smooth": smooth})
    assert value(ours, said, rows_of(references)) == theirs.corpus_score(said, streams_of(references)).score


@given(corpus, st.booleans(), st.sampled_from([0, 2]))
def test_chrf_is_sacrebleus(rows: list[tuple[str, list[str]]], lowercase: bool, word_order: int) -> None:
    said, references = [one for one, _ in rows], [texts for _, texts in rows]
    theirs = CHRF(word_order=word_order, lowercase=lowercase)
    ours = metric_named("chrf", {"lowercase": lowercase, "word_order": word_order})
    assert value(ours, said, rows_of(references)) == theirs.corpus_score(said, streams_of(references)).score


def test_sums_of_many_resamples_at_once() -> None:
    for name in ("bleu", "chrf"):
        metric = metric_named(name)
        stats = metric.statistics(SAID, rows_of(REFERENCES))
        assert stats.dtype == np.float64
        sums = np.stack([stats.sum(axis=0), 2 * stats[0] + stats[2]])[None]
        values = metric.value(sums)
        assert values.shape == (1, 2)
        again = [SAID[0], SAID[0], SAID[2]], rows_of([REFERENCES[0], REFERENCES[0], REFERENCES[2]])
        assert values[0].tolist() == [value(metric, SAID, rows_of(REFERENCES)), value(metric, *again)]


def test_the_template_outputs_of_e2e_have_their_known_scores(shared: Path) -> None:
    folder = shared / "e2e_nlg" / "official"
    groups = (folder / "test_refs.txt").read_text(encoding="utf-8").strip().split("\n\n")
    rows = rows_of([group.split("\n") for group in groups])
    said = (folder / "template_outputs.txt").read_text(encoding="utf-8").splitlines()
    assert len(said) == len(rows) == 630
    assert round(value(metric_named("bleu"), said, rows), 2) == 60.94
    assert round(value(metric_named("bleu", {"lowercase": True}), said, rows), 2) == 61.67
    assert round(value(metric_named("chrf"), said, rows), 2) == 69.17


def test_exact_match_leaves_blanks_at_the_ends_aside() -> None:
    rows = [{"completion": "yes "}, {"references": ["a", "b"]}, {"completion": "x"}, {"completion": "x"}]
    said = [" yes\n", "b", "X", "x\nand more"]
    assert metric_named("exact_match").statistics(said, rows).tolist() == [[100, 1], [100, 1], [0, 1], [0, 1]]
    first = metric_named("exact_match", {"first_line": True})
    assert value(first, said, rows) == 75
    assert (first.name, first.better, first.unit) == ("exact_match", "higher", "%")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Dog!", "dog"),
        ("a an the Theatre", "theatre"),
        ("U.S.A.,  now", "usa now"),
        ("«Größe»  an sich", "«größe» sich"),
        ("the", ""),
    ],
)
def test_squads_normalisation(text: str, plain: str) -> None:
    assert normalised(text) == plain


def test_normalised_match_takes_any_reference() -> None:
    rows = rows_of([["The Eiffel Tower", "Eiffel"], ["five"]])
    assert value(metric_named("normalised_match"), ["the eiffel tower.", "six"], rows) == 50


def squad_f1(answer: str, reference: str) -> float:
    """F1 as SQuAD's own script (evaluate-v2.0.py) reckons it."""
    said, gold = normalised(answer).split(), normalised(reference).split()
    common = collections.Counter(gold) & collections.Counter(said)
    num_same = sum(common.values())
    if len(gold) == 0 or len(said) == 0:
        return int(gold == said)
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(said)
    recall = 1.0 * num_same / len(gold)
    return (2 * precision * recall) / (precision + recall)


@given(st.lists(st.tuples(sentence, st.lists(sentence, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_token_f1_is_squads(rows: list[tuple[str, list[str]]]) -> None:
    said, references = [one for one, _ in rows], [texts for _, texts in rows]
    wanted = [max(squad_f1(one, text) for text in texts) for one, texts in rows]
    assert value(metric_named("token_f1"), said, rows_of(references)) == pytest.approx(100 * np.mean(wanted))


def test_token_f1_by_hand() -> None:
    rows = rows_of([["The Eiffel Tower"], ["in the year 1889"], ["the"]])
    # eiffel tower of {eiffel, tower, paris}: 2/3 and 1; nothing shared; "the" and "a." have no word left: equal
    assert value(metric_named("token_f1"), ["Eiffel tower, Paris!", "1890", "a."], rows) == pytest.approx(
        100 * (2 * (2 / 3) / (2 / 3 + 1) + 0 + 1) / 3
    )
    assert value(metric_named("token_f1", {"first_line": True}), ["1889 year in\nand on"], rows[1:2]) == 100


@pytest.mark.parametrize("name", ["bleu", "chrf", "rouge_1", "rouge_2", "rouge_l", "rouge_lsum", "token_f1"])
@pytest.mark.parametrize("empty", ["", " "])
def test_whatever_is_answered_to_an_empty_reference_costs_something(name: str, empty: str) -> None:
    metric = metric_named(name)
    text = "one long answer of words"
    rows = rows_of([[empty], [text]])
    full = value(metric, ["", text], rows)
    assert full == pytest.approx(100)
    assert value(metric, ["x y z", text], rows) < full - 0.5
    assert value(metric, ["x y z"], rows[:1]) == 0
    either = rows_of([[empty, text], [text]])  # an empty answer is one of those wanted
    assert value(metric, ["", text], either) == pytest.approx(100)
    assert value(metric, [text, text], either) == pytest.approx(100)
    assert value(metric, ["x y z", text], either) < 99.5


def test_a_row_without_an_answer_is_named() -> None:
    with pytest.raises(JudgeError, match=r"row 2: .*columns"):
        metric_named("bleu").statistics(["x", "y"], [{"references": ["x"]}, {"question": "y"}])
    with pytest.raises(JudgeError, match="1 answers were given for 2 rows"):
        metric_named("exact_match").statistics(["x"], rows_of([["x"], ["y"]]))
    with pytest.raises(JudgeError, match="'13b'"):
        metric_named("bleu", {"tokenize": "13b"})
    with pytest.raises(JudgeError, match=r"lowercse.*did you mean 'lowercase'"):
        metric_named("bleu", {"lowercse": True})
