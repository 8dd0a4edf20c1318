"""What a row asks and wants, in each of its shapes, and the errors of rows that do not say it."""

from __future__ import annotations

from typing import Any

import pytest

from postil.errors import JudgeError
from postil.judging.metrics import asked, wanted
from postil.judging.metrics.wanted import wanted_calls

CALL = {"name": "book", "arguments": {"room": 3}}
LINE = '<tool_call>{"name": "book", "arguments": {"room": 3}}</tool_call>'
ASK = {"role": "user", "content": "Book room 3."}
CALLS = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"references": ["a", "b"], "completion": "c", "prompt": "p"}, ["a", "b"]),
        ({"prompt": "p", "completion": "c"}, ["c"]),
        ({"completion": "c"}, ["c"]),
        ({"prompt": "p", "completion": "c", "accept": ["c", "d"]}, ["c", "d"]),
        ({"prompt": "p", "completion": "c", "accept": [{"name": "book", "arguments": {}}]}, ["c"]),
        ({"instruction": "i", "output": "o"}, ["o"]),
        ({"messages": [ASK, {"role": "assistant", "content": "Done."}]}, ["Done."]),
        ({"messages": [ASK, CALLS]}, [LINE]),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ["a"]),
    ],
)
def test_what_a_row_wants(row: dict[str, Any], texts: list[str]) -> None:
    assert wanted(row) == texts


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ({"references": []}, "`references` must be a list of at least one string"),
        ({"references": "a"}, "`references` must be a list"),
        ({"references": ["a", None]}, "`references` must be a list"),
        ({"text": "whole"}, "judged by its loss only"),
        ({"prompt": "p", "complection": "c"}, "columns 'prompt', 'complection' are not known"),
        ({"messages": [ASK, {"role": "assistant", "content": "x"}, ASK]}, "the last message must be the assistant's"),
    ],
)
def test_rows_that_want_nothing(row: dict[str, Any], wrong: str) -> None:
    with pytest.raises(JudgeError, match=wrong):
        wanted(row)


def test_what_a_row_asks() -> None:
    assert asked({"prompt": "p", "references": ["a"]}) == "p"
    assert asked({"messages": [ASK, CALLS]}) == "Book room 3."
    assert asked({"instruction": "i", "input": "n", "output": "o"}) == "i\n\nn"
    with pytest.raises(JudgeError, match="neither a prompt nor a user message"):
        asked({"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "x"}]})


def test_the_calls_a_row_wants() -> None:
    assert wanted_calls({"calls": [CALL], "prompt": "p", "completion": "c"}) == [CALL]
    assert wanted_calls({"messages": [ASK, CALLS]}) == [CALL]
    assert wanted_calls({"prompt": "p", "completion": f"One moment.\n{LINE}\n{LINE}"}) == [CALL, CALL]
    assert wanted_calls({"messages": [ASK, {"role": "assistant", "content": "No."}]}) == []
    with pytest.raises(JudgeError, match="`calls` must be a list"):
        wanted_calls({"calls": [{"name": "book"}]})
