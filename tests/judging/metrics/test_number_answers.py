"""Numeric answers: which number of a text counts, and how near it must be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postil.errors import JudgeError
from postil.judging.metrics import metric_named
from postil.judging.metrics.number_answers import last_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("She makes 9 * 2 = $18 every day.\n#### 18", 18),
        ("#### 18 and not 20", 18),
        ("first #### 3, then #### 1,234", 1234),
        ("5 apples ####", 5),
        ("It costs 1,234,567.50 in all.", 1234567.5),
        ("I paid 1,000, and left.", 1000),
        ("3,4", 4),
        ("12,34", 34),
        ("1,234,5", 5),
        ("9-4", 4),
        ("minus: -4", -4),
        ("The answer is:\n- 42", 42),
        ("9 - 4", 4),
        ("between 3 - 5", 5),
        ("$-5", -5),
        ("-.5", -0.5),
        ("= -1,000", -1000),
        ("x = −0.5", -0.5),
        ("-$5", -5),
        ("$ 5.", 5),
        (".25", 0.25),
        ("2.5e3", 2500),
        ("50%", 50),
        ("7.", 7),
        # groups of three, whatever marks them; a comma between other digits parts two numbers
        ("1.234,56", 1234.56),
        ("-1.234,5", -1234.5),
        ("(1.234,56).", 1234.56),
        ("1.234.567", 1234567),
        ("1.234", 1.234),
        ("1 000 000", 1000000),
        ("1\u202f000\u00a0000.5", 1000000.5),
        ("12 345,5", 12345.5),
        ("12 34", 34),
        # fractions and powers
        ("3/4", 0.75),
        ("-3/4 of it", -0.75),
        ("3 / 4", 4),
        ("1 1/2 cups", 1.5),
        ("½", 0.5),
        ("1½", 1.5),
        ("-2 ¾", -2.75),
        (r"\frac{3}{4}", 0.75),
        (r"$\boxed{42}$", 42),
        ("10^6", 1e6),
        ("10**6", 1e6),
        ("10⁶", 1e6),
        ("10^{-2}", 0.01),
        ("2^10", 1024),
        ("1.5 × 10^6", 1.5e6),
        (r"2 \times 10^3", 2000),
        ("3*10⁻²", 0.03),
        ("1e6", 1e6),
        ("2.5 million", 2.5),
        # no numbers, and no part of them is one
        ("12:30", None),
        ("at 12:30 it is 7", 7),
        ("7, a ratio of 3:4", 7),
        ("2 on 1/2/2024", 2),
        ("2 on 2024-02-01", 2),
        ("2 in 1.2.3", 2),
        ("2 at 0x1F", 2),
        ("1/0", None),
        ("10^999", None),
        ("9e999", None),
        ("³", None),
        ("no number", None),
        ("", None),
        ("####", None),
    ],
)
def test_the_number_of_a_text(text: str, value: float | None) -> None:
    assert last_number(text) == value


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "so it is {}.", "2 + 2 = 4\n#### {:,}\n"]))
def test_integers_are_found_as_written(value: int, form: str) -> None:
    assert last_number(form.format(value)) == value


def test_decimals_may_follow_a_comma() -> None:
    for text, value in {"12,34": 12.34, "1.234": 1234, "1.234,5": 1234.5, "1,5 · 10^3": 1500}.items():
        assert last_number(text, decimal=",") == value
    assert score(["3,5"], [{"answer": "3,50"}], decimal=",") == [100]


def test_a_column_that_wins_over_the_answer_is_said() -> None:
    rows = [{"prompt": "?", "completion": "5", "answer": 7}, {"prompt": "?", "completion": "6"}]
    (note,) = metric_named("number").look(rows)
    assert note.startswith(
        "number: the wanted number of 1 rows is read from their column 'answer' and not from their"
    )
    assert metric_named("number", {"column": "answer"}).look(rows) == []
    assert metric_named("number").look(rows[1:]) == []


@given(st.text() | st.text(alphabet="0123456789., /^:-½⁶"))
def test_any_text_has_a_number_or_none(text: str) -> None:
    assert last_number(text) is None or isinstance(last_number(text), float)


def score(answers: list[str], rows: list[dict[str, object]], **options: object) -> list[float]:
    return [float(one) for one in metric_named("number", options).statistics(answers, rows)[:, 0]]


def test_the_wanted_number_is_the_column_or_the_answers() -> None:
    rows = [
        {"prompt": "?", "completion": "2 + 3 = 5\n#### 5", "answer": "5"},
        {"references": ["4", "or 6"]},
        {"n": 7},
    ]
    assert score(["it is 5", "6"], rows[:2]) == [100, 100]
    assert score(["3", "none"], rows[:2]) == [0, 0]
    assert score(["7.0"], rows[2:], column="n") == [100]
    with pytest.raises(JudgeError, match="row 1: no number is in the wanted answer 'many'"):
        score(["1"], [{"answer": "many"}])


def test_tolerance_is_how_far_still_counts() -> None:
    rows = [{"answer": 10.0}] * 3
    answers = ["10.4", "10.5", "10.51"]
    assert score(answers, rows, tolerance=0.5) == [100, 100, 0]
    assert score(["10.000000000001", "10.4", "9.99"], rows) == [100, 0, 0]
    with pytest.raises(JudgeError, match="tolerance"):
        metric_named("number", {"tolerance": -1})
