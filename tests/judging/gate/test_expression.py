"""The gate's expression: it reads back to itself, binds as Python does, and names a slip with its column."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postil.errors import JudgeError
from postil.judging.gate.expression import And, Compare, Judged, Node, Not, Or, leaves, number, parse

PATHS = st.sampled_from(
    ["target", "target.bleu", "general.nats", "slices", "slices.accuracy", "target.intent=refund.accuracy",
     "target.own.score", "general.choices.subject=law.accuracy",
     "target.topic=card arrival (new).bleu", 'target.size=5".bleu', "target.größe=1.5"]
)  # fmt: skip
OFFSETS = st.floats(allow_nan=False, allow_infinity=False)
COMPARES = st.builds(
    Compare, PATHS, st.sampled_from(["", "low", "high"]), st.sampled_from(["<", "<=", ">", ">="]),
    st.sampled_from(["", "base", "live", "few_shot", "trivial"]), OFFSETS,
)  # fmt: skip
COUNTS = st.builds(
    Compare, st.sampled_from(["contamination", "contamination.target", "leakage.adapter"]), st.just(""),
    st.sampled_from(["<", "<="]), st.just(""), OFFSETS,
)  # fmt: skip
LEAVES = (
    COMPARES | COUNTS
    | st.builds(Judged, PATHS, st.booleans(), st.sampled_from(["better", "worse", "kept"]))
    | st.builds(Judged, st.sampled_from(["general", "leakage"]), st.booleans(), st.just("kept"))
    | st.builds(Judged, st.sampled_from(["contamination", "contamination.target"]), st.booleans(), st.just("none"))
)  # fmt: skip


def nodes(inner: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    """Trees of and, or and not over such leaves."""
    return st.recursive(
        inner,
        lambda part: (
            st.builds(Not, part)
            | st.builds(And, st.lists(part, min_size=2, max_size=4).map(tuple))
            | st.builds(Or, st.lists(part, min_size=2, max_size=4).map(tuple))
        ),
        max_leaves=12,
    )


@given(nodes(LEAVES))
def test_an_expression_reads_back_to_itself(node: Node) -> None:
    assert parse(str(node)) == node
    assert parse(f"\n ( {node} )\t") == node


@given(st.text(alphabet="()<>=+-.'\" 5e\nabcdeilnorstvw_", max_size=60) | st.text(max_size=30))
def test_any_text_is_read_or_refused_in_a_sentence(text: str) -> None:
    with contextlib.suppress(JudgeError):
        node = parse(text)
        assert parse(str(node)) == node


def test_not_binds_before_and_before_or() -> None:
    a, b, c = parse("target is better"), parse("general.nats < base"), parse("slices is not worse")
    assert parse(f"{a} or not {b} and {c}") == Or((a, And((Not(b), c))))
    assert parse(f"({a} or not {b}) and {c}") == And((Or((a, Not(b))), c))
    assert parse("target.bleu>=base-.5") == Compare("target.bleu", "", ">=", "base", -0.5)
    assert parse("target.bleu.low<-1e-3") == Compare("target.bleu", "low", "<", "", -0.001)
    assert [leaf.column for leaf in leaves(parse("target is better and (general.nats < 3)"))] == [1, 23]


@pytest.mark.parametrize(
    ("text", "column", "said"),
    [
        ("", 1, "found the end"),
        ("target.bleu", 12, "expected <, <=, >, >= or 'is'"),
        ("taget.bleu > base", 1, "did you mean 'target'"),
        ("target is beter", 11, "did you mean 'better'"),
        ("target.bleu > bse", 15, "did you mean 'base'"),
        ("target.bleu > base + base", 22, "expected a number"),
        ("target.bleu > base + 5 - 2", 24, "expected 'and', 'or' or the end"),
        ("target.bleu > base And target is better", 20, "did you mean 'and'"),
        ("(target is better", 18, "expected ')'"),
        ("target.bleu == 5", 13, "expected <, <=, >, >= or 'is'"),
        ("target.bleu==5", 1, "knows <, <=, > and >= only"),
        ("target.bleu >== 5", 15, "expected <, <=, >, >= or 'is'"),
        ("5 < target.bleu", 1, "expected a measure"),
        ("base > target.bleu", 1, "expected a measure"),
        ('"target.bleu > 5', 1, "never closed"),
        ("target.bleu > 1e999", 15, "too large"),
        ("target is none", 1, "'none' is for contamination"),
        ("contamination is kept", 1, "`contamination is none`"),
        ("contamination.target < base", 1, "which is a count"),
        ("leakage is better", 1, "`leakage.adapter < base + 5`"),
        ("leakage.adapter < live", 1, "compared with base or a number"),
        ("leakage.adapter is kept", 1, "`leakage is kept`"),
        ("target is better and general is worse", 22, "name one, such as general.nats"),
        ("general < 5", 1, "ask `general is kept`"),
        ("not " * 60 + "target is better", 205, "more than 50"),
    ],
)
def test_a_slip_is_named_with_its_column(text: str, column: int, said: str) -> None:
    with pytest.raises(JudgeError) as refusal:
        parse(text)
    assert str(refusal.value).startswith(f"gate expression, column {column}: ")
    assert said in str(refusal.value)


@pytest.mark.parametrize(("value", "text"), [(5, "5"), (0.05, "0.05"), (1e-7, "1e-07"), (-2.5, "-2.5")])
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text
