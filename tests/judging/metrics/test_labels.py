"""Label measures: equal to scikit-learn's, on its own example and on any labels; unknown answers are misses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from postil.errors import JudgeError
from postil.judging.metrics import metric_named

# scikit-learn's own example (f1_score and accuracy_score in its reference).
TRUE, SAID = ["0", "1", "2", "0", "1", "2"], ["0", "2", "1", "0", "0", "1"]

labels = st.sampled_from(["a", "b", "c", "d"])
pairs = st.lists(st.tuples(labels, labels), min_size=1, max_size=20)


def score(name: str, said: list[str], true: list[str], **options: object) -> float:
    metric = metric_named(name, options)
    return float(metric.value(metric.statistics(said, [{"completion": one} for one in true]).sum(axis=0)))


def test_scikit_learns_own_example() -> None:
    assert score("macro_f1", SAID, TRUE) == pytest.approx(100 * 0.26666666666666666)
    assert score("weighted_f1", SAID, TRUE) == pytest.approx(100 * 0.26666666666666666)
    assert score("accuracy", ["0", "2", "1", "3"], ["0", "1", "2", "3"]) == 50


@given(pairs)
def test_equal_to_scikit_learn(rows: list[tuple[str, str]]) -> None:
    true, said = [one for one, _ in rows], [one for _, one in rows]
    assert score("accuracy", said, true) == pytest.approx(100 * accuracy_score(true, said))
    for name, average in (("macro_f1", "macro"), ("weighted_f1", "weighted")):
        ours = score(name, said, true, labels=["a", "b", "c", "d"])
        assert ours == pytest.approx(100 * f1_score(true, said, average=average, zero_division=0.0))


@given(pairs)
def test_without_a_list_the_labels_are_those_wanted(rows: list[tuple[str, str]]) -> None:
    true, said = [one for one, _ in rows], [one for _, one in rows]
    theirs = f1_score(true, said, labels=sorted(set(true)), average="macro", zero_division=0.0)
    assert score("macro_f1", said, true) == pytest.approx(100 * theirs)


@given(pairs, st.integers(0, 2**32))
def test_a_resample_is_scikit_learns_of_its_rows(rows: list[tuple[str, str]], seed: int) -> None:
    picked = np.random.default_rng(seed).integers(0, len(rows), len(rows))
    true, said = np.array([one for one, _ in rows]), np.array([one for _, one in rows])
    metric = metric_named("macro_f1", {"labels": ["a", "b", "c", "d"]})
    stats = metric.statistics(said.tolist(), [{"completion": str(one)} for one in true])
    theirs = f1_score(true[picked], said[picked], average="macro", zero_division=0.0)
    assert float(metric.value(stats[picked].sum(axis=0))) == pytest.approx(100 * theirs)


def test_answers_are_stripped_and_strangers_are_misses() -> None:
    true = ["yes", "no", "no"]
    assert score("accuracy", ["yes\n", " no", "No"], true) == pytest.approx(200 / 3)
    # yes: F1 1; no: tp 1, fn 1 -> 2/3; "No" is no label
    assert score("macro_f1", ["yes\n", " no", "No"], true) == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert score("accuracy", ["yes\nbecause", "no", "no"], true, first_line=True) == 100


def test_free_text_has_no_f1() -> None:
    many = [str(i) for i in range(1001)]
    with pytest.raises(JudgeError, match="1,001 different answers"):
        score("macro_f1", many, many)
    with pytest.raises(JudgeError, match="row 1: F1 over labels needs one label a row"):
        metric_named("macro_f1").statistics(["a"], [{"references": ["a", "b"]}])
