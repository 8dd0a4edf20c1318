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
        theirs = f1_score(true, said, average=average, zero_division=0.0)
        assert score(name, said, true) == pytest.approx(100 * theirs)
        theirs = f1_score(true, said, labels=["a", "b", "c", "d", "e"], average=average, zero_division=0.0)
        assert score(name, said, true, labels=["a", "b", "c", "d", "e"]) == pytest.approx(100 * theirs)
        theirs = f1_score(true, said, labels=sorted(set(true)), average=average, zero_division=0.0)
        assert score(name, said, true, others="miss") == pytest.approx(100 * theirs)


def test_labels_that_nobody_uses_and_answers_that_nobody_wants_count() -> None:
    true = ["a"] * 5 + ["b"] * 5
    assert score("macro_f1", ["a"] * 10, true, labels=["a", "b", "c", "d"]) == pytest.approx(100 / 6)
    strange = ["a"] * 5 + ["c"] * 5
    assert score("macro_f1", strange, true) == pytest.approx(100 / 3)
    assert (
        score("macro_f1", strange, true, others="miss") == score("macro_f1", strange, true, labels=["a", "b"]) == 50
    )


@given(pairs, st.integers(0, 2**32))
def test_a_resample_is_scikit_learns_of_its_rows(rows: list[tuple[str, str]], seed: int) -> None:
    picked = np.random.default_rng(seed).integers(0, len(rows), len(rows))
    true, said = np.array([one for one, _ in rows]), np.array([one for _, one in rows])
    metric = metric_named("macro_f1")
    stats = metric.statistics(said.tolist(), [{"completion": str(one)} for one in true])
    theirs = f1_score(true[picked], said[picked], average="macro", zero_division=0.0)
    found = metric.value(np.stack([stats[picked].sum(axis=0)] * 2)[None])
    assert found.tolist() == [[pytest.approx(100 * theirs)] * 2]


def test_both_sides_have_statistics_of_one_width() -> None:
    rows = [{"completion": one} for one in ("a", "b", "a")]
    metric = metric_named("macro_f1")
    sides = [metric.statistics(said, rows) for said in (["a", "b", "a"], ["x", "y", "x"], ["z", "a", ""])]
    assert len({one.shape for one in sides}) == 1
    assert [float(metric.value(one.sum(axis=0))) for one in sides] == [100, 0, 0]


def test_answers_are_stripped_and_strangers_are_misses() -> None:
    true = ["yes", "no", "no"]
    assert score("accuracy", ["yes\n", " no", "No"], true) == pytest.approx(200 / 3)
    # yes: F1 1; no: tp 1, fn 1 -> 2/3; "No" is a third label, or only a miss
    assert score("macro_f1", ["yes\n", " no", "No"], true) == pytest.approx(100 * (1 + 2 / 3) / 3)
    assert score("macro_f1", ["yes\n", " no", "No"], true, others="miss") == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert score("accuracy", ["yes\nbecause", "no", "no"], true, first_line=True) == 100


def test_a_wanted_label_that_is_not_among_those_given_is_named() -> None:
    with pytest.raises(JudgeError, match=r"row 2: the row wants 'noo', .* \(did you mean 'no'\?\)"):
        score("macro_f1", ["yes", "no"], ["yes", "noo"], labels=["yes", "no"])


def test_accuracy_is_the_exact_match_of_labels() -> None:
    rows = [{"references": ["a", "b "]}, {"completion": "c"}]
    said = [" b", "C"]
    accuracy, exact = (metric_named(name) for name in ("accuracy", "exact_match"))
    assert accuracy.statistics(said, rows).tolist() == exact.statistics(said, rows).tolist() == [[100, 1], [0, 1]]


def test_free_text_has_no_f1() -> None:
    few = [str(i % 9) for i in range(4001)]
    with pytest.raises(JudgeError, match=r"for up to 4,000 rows, and here are 4,001; give the labels"):
        score("macro_f1", few, few)
    assert score("macro_f1", few, few, others="miss") == 100
    many = [str(i) for i in range(1001)]
    with pytest.raises(JudgeError, match="1,001 different answers"):
        score("macro_f1", many, many)
    with pytest.raises(JudgeError, match="row 1: F1 over labels needs one label a row"):
        metric_named("macro_f1").statistics(["a"], [{"references": ["a", "b"]}])
