"""Measures by name: all known ones, the nearest for a slip, and the guess that fits the rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postil.errors import JudgeError
from postil.judging.metrics import METRICS, default_metric, metric_named
from postil.judging.metrics.options import OwnOptions


@pytest.mark.parametrize("name", METRICS)
def test_every_measure_has_its_name_and_refuses_unknown_options(name: str) -> None:
    assert metric_named(name).name == name
    with pytest.raises(JudgeError, match="options of the metric: unknown key 'colour'"):
        metric_named(name, {"colour": 1})


def test_an_unknown_name_tells_the_nearest_and_all() -> None:
    with pytest.raises(JudgeError, match=r"'belu' \(did you mean 'bleu'\?\); known: exact_match, .*regex.*file\.py"):
        metric_named("belu")


def table_of_measures() -> dict[str, set[str]]:
    """Every measure in the table of docs/judging.md, with the options that stand beside it."""
    page = (Path(__file__).parents[3] / "docs/judging.md").read_text(encoding="utf-8")
    section = page.partition("### Measures of answers")[2].partition("\n### ")[0]
    found = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            names, _, options = (re.findall(r"`([^`]+)`", cell) for cell in line.strip("|").split("|"))
            found |= {name: set(options) for name in names}
    return found


def test_the_page_names_every_measure_with_its_options() -> None:
    table = table_of_measures()
    own = table.pop("FILE.py:FUNCTION")
    assert list(table) == list(METRICS)
    assert own == set(OwnOptions.model_fields)
    for name, options in table.items():
        with pytest.raises(JudgeError) as problem:
            metric_named(name, {"q": 1})
        known = str(problem.value).partition("known: ")[2].split(", ")
        assert options == set(known) - {"none"}, name


def pairs(*completions: str) -> list[dict[str, Any]]:
    return [{"prompt": "p", "completion": one} for one in completions]


@pytest.mark.parametrize(
    ("rows", "name", "because"),
    [
        (pairs("yes", "no") * 3, "accuracy", "2 labels"),
        (pairs("yes", "no", "yes"), "exact_match", "short"),
        (pairs("yes") * 3, "accuracy", "every answer is the same label"),
        (pairs('{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "arguments": {}}'), "exact_calls", "are calls"),
        (pairs("ab cd", "ef", "gh"), "exact_match", "short"),
        (pairs("It is so, I think.", "Where do you want to go?"), "bleu", "free text"),
        (pairs("2 + 3 = 5\n#### 5", "#### 6"), "number", "####"),
        ([{"references": ["a b c d", "e"]}, {"references": ["f"]}], "bleu", "several references"),
        ([{"references": ["dos", "two"]}, {"references": ["drei"]}], "exact_match", "several count"),
        ([{"references": ["a b c d", "a b c d"]}, {"references": ["f g h i j"]}], "bleu", "free text"),
        ([{"tools": [{"name": "f"}], "calls": [{"name": "f", "arguments": {}}]}], "exact_calls", "tools"),
        ([{"tools": [{"name": "f"}], "calls": []}], "refusals", "want no call"),
    ],
)
def test_the_guess(rows: list[dict[str, Any]], name: str, because: str) -> None:
    guess, why = default_metric(rows)
    assert guess == name
    assert because in why


def test_a_guess_needs_rows_with_answers() -> None:
    with pytest.raises(JudgeError, match="an empty set"):
        default_metric([])
    with pytest.raises(JudgeError, match="row 2: "):
        default_metric([*pairs("a"), {"text": "b"}])


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("tool_calls/test.jsonl", "exact_calls"),
        ("banking77/test.jsonl", "accuracy"),
        ("sentence_polarity/test.jsonl", "accuracy"),
        ("many_tasks/intent_home/test.jsonl", "accuracy"),
        ("many_tasks/antonyms/test.jsonl", "exact_match"),
        ("many_tasks/to_german/test.jsonl", "exact_match"),
        ("skills/reverse_word/test.jsonl", "exact_match"),
        ("gsm8k/test.jsonl", "number"),
        ("e2e_nlg/test.jsonl", "bleu"),
        ("style_archaic/test.jsonl", "bleu"),
    ],
)
def test_the_guess_on_real_sets(shared_rows: Callable[[str], list[dict[str, Any]]], file: str, name: str) -> None:
    assert default_metric(shared_rows(file))[0] == name
