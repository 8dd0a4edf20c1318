"""ROUGE: equal to the rouge-score package on ASCII text, ROUGE-L also beside a plain search."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from postil.judging.metrics import metric_named
from postil.judging.metrics.rouge import rouge_l_f1

THEIRS = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL", "rouge_lsum": "rougeLsum"}
scorer = RougeScorer(list(THEIRS.values()))

words = st.sampled_from(["the", "dog", "bit", "a", "man", "3.5", "it's", ",", "hi_there", "The", "\n", "\n"])
text = st.lists(words, max_size=16).map(" ".join)
wanted = text.filter(lambda one: any(letter.isalnum() for letter in one))


def value(name: str, said: list[str], references: list[list[str]]) -> float:
    metric = metric_named(name)
    return float(metric.value(metric.statistics(said, [{"references": texts} for texts in references]).sum(axis=0)))


@given(st.lists(st.tuples(text, st.lists(wanted, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_rouge_is_the_packages(rows: list[tuple[str, list[str]]]) -> None:
    said, references = [one for one, _ in rows], [texts for _, texts in rows]
    for name, theirs in THEIRS.items():
        found = [scorer.score_multi(texts, one)[theirs].fmeasure for one, texts in rows]
        assert value(name, said, references) == pytest.approx(100 * sum(found) / len(found))


def test_a_summary_of_lin_2004() -> None:
    # section 3.2: the union of w1 w2 and w1 w3 w5 is four of the reference's five words
    answer, reference = "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", "w1 w2 w3 w4 w5"
    assert value("rouge_lsum", [answer], [[reference]]) == pytest.approx(
        100 * 2 * (4 / 5) * (4 / 10) / (4 / 5 + 4 / 10)
    )
    assert value("rouge_1", ["a b b c"], [["b b b d"]]) == 50
    assert value("rouge_2", ["a b c"], [["b c d"]]) == 50


def longest(first: list[str], second: list[str]) -> int:
    """The longest common subsequence by trying every one."""
    return max(
        size
        for size in range(len(first) + 1)
        for kept in itertools.combinations(first, size)
        if is_within(list(kept), second)
    )


def is_within(kept: list[str], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(word in rest for word in kept)


@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_rouge_l_is_f1_of_the_longest_common_subsequence(first: list[str], second: list[str]) -> None:
    common = longest(first, second)
    wanted = 0.0 if not common else 2 * common / (len(first) + len(second))
    assert rouge_l_f1(" ".join(first), " ".join(second)) == pytest.approx(wanted)


def test_rouge_l_words_and_the_best_reference() -> None:
    # the quick brown · the · dog; the package rouge-score gives this pair the same value
    assert rouge_l_f1("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog") == (
        pytest.approx(2 * (5 / 8) * (5 / 9) / (5 / 8 + 5 / 9))
    )
    assert rouge_l_f1("It's_well-known", "it s WELL known!") == 1
    assert rouge_l_f1("größe", "gr e") == 0
    assert value("rouge_l", ["a b", ""], [["c", "a b"], ["x"]]) == 50
