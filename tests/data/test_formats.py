"""Columns detected and rows checked: each mistake gives its own sentence."""

from __future__ import annotations

from typing import Any

import pytest

from postil.data.formats import Chat, Pair, Text, detect, read_row, rename
from postil.data.messages import calls_of, check_messages, check_tools
from postil.data.options import DataOptions
from postil.errors import DataError

ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def answered(**changed: Any) -> dict[str, Any]:
    return {"messages": [ASK, {**ANSWER, **changed}]}


def called(call: Any) -> dict[str, Any]:
    return answered(tool_calls=[call])


def parse(row: dict[str, Any], **options: Any) -> Chat | Pair | Text:
    chosen = DataOptions(**options)
    renamed = rename(row, chosen.columns)
    return read_row(renamed, detect(renamed, chosen))


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"messages": [], "prompt": "p", "completion": "c"}, "chat messages"),
        ({"conversations": []}, "ShareGPT conversations"),
        ({"prompt": "p", "completion": "c", "text": "t"}, "prompt and completion"),
        ({"instruction": "i", "input": "", "output": "o", "text": "t"}, "Alpaca"),
        ({"text": "t", "id": 3}, "text"),
    ],
)
def test_detection(row: dict[str, Any], label: str) -> None:
    assert detect(row, DataOptions()).label == label


def test_a_format_insists() -> None:
    row = {"messages": [], "text": "t"}
    assert detect(row, DataOptions(format="text")).label == "text"
    with pytest.raises(DataError, match=r"the columns 'messages', 'text' are not known; wanted: prompt and"):
        detect(row, DataOptions(format="raw"))


def test_unknown_columns_name_the_nearest_and_the_mend() -> None:
    with pytest.raises(DataError, match=r"'mesages' are not known \(did you mean 'messages'\?\)"):
        detect({"mesages": []}, DataOptions())
    with pytest.raises(DataError, match=r"\{prompt: question, completion: answer\}"):
        detect({"question": "q", "answer": "a"}, DataOptions())


def test_columns_are_mapped() -> None:
    columns = {"prompt": "question", "completion": "answer"}
    row = {"question": "q", "answer": "a", "id": 1}
    assert parse(row, columns=columns) == Pair("q", "a", "")
    with pytest.raises(DataError, match=r"no column 'answer' \(did you mean 'answers'\?\)"):
        parse({"question": "q", "answers": "a"}, columns=columns)
    swap = {"prompt": "completion", "completion": "prompt"}
    assert parse({"prompt": "a", "completion": "b"}, columns=swap) == Pair("b", "a", "")


def test_a_mapped_column_that_rows_may_have_may_be_absent() -> None:
    columns = {"instruction": "q", "output": "a", "input": "ctx", "system": "sys"}
    assert parse({"q": "1", "a": "x", "ctx": "c"}, columns=columns) == Pair("1\n\nc", "x", "")
    assert parse({"q": "1", "a": "x", "sys": "s"}, columns=columns) == Pair("1", "x", "s")
    with pytest.raises(DataError, match="no column 'a'"):
        parse({"q": "1", "ctx": "c"}, columns=columns)


def test_alpaca_joins_instruction_and_input() -> None:
    assert parse({"instruction": "i", "input": "x", "output": "o"}) == Pair("i\n\nx", "o", "")
    assert parse({"instruction": "i", "input": "", "output": "o"}) == Pair("i", "o", "")
    assert parse({"instruction": "i", "output": "o", "system": "s"}) == Pair("i", "o", "s")


def test_sharegpt_roles_and_calls() -> None:
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "r"},
        {"from": "gpt", "value": "a", "weight": 2},
    ]
    chat = parse({"conversations": turns, "system": "s", "tools": '[{"name": "f"}]'})
    assert isinstance(chat, Chat)
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert calls_of(chat.messages[2]) == [{"name": "f", "arguments": {"x": 1}}]
    assert chat.messages[4]["weight"] == 2.0
    assert chat.tools == [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(DataError, match=r"message 1: unknown `from` 'humn' \(did you mean 'human'\?\)"):
        parse({"conversations": [{"from": "humn", "value": "q"}]})
    with pytest.raises(DataError, match="message 1 must be an object with `from` and `value`"):
        parse({"conversations": [{"from": "human"}]})


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"prompt": "p", "completion": " \n"}, "'completion' is empty"),
        ({"prompt": "p", "completion": None}, "'completion' must be a string, found null"),
        ({"prompt": ["p"], "completion": "c"}, "'prompt' must be a string, found list"),
        ({"instruction": "", "output": "o"}, "'instruction' is empty"),
        ({"instruction": "i", "output": "o", "inputs": "x"}, "the column 'inputs' is unknown"),
        ({"text": ""}, "'text' is empty"),
        ({"text": 3}, "'text' must be a string, found int"),
        ({"messages": "x"}, "`messages` must be a list"),
        ({"messages": []}, "`messages` must be a list of at least one"),
        ({"messages": ["x"]}, "message 1 must be an object"),
        ({"messages": [ASK]}, "`messages` has no assistant turn"),
        (answered(role="asistant"), "unknown role 'asistant' (did you mean 'assistant'?)"),
        (answered(role="Assistant"), "(did you mean 'assistant'?)"),
        ({"messages": [ASK, {"content": "a"}]}, "message 2 has the unknown role None"),
        (answered(content=["a"]), "message 2: `content` must be a string, found list"),
        ({"messages": [ASK, {"role": "assistant"}]}, "message 2: `content` must be a string, found nothing"),
        (answered(content=" "), "message 2: the assistant's content is empty"),
        (answered(tool_cals=[]), "message 2 has the unknown key 'tool_cals' (did you mean 'tool_calls'?)"),
        ({"messages": [{**ASK, "tool_calls": [{"name": "f"}]}, ANSWER]}, "only an assistant calls tools"),
        (answered(tool_calls={"name": "f"}), "`tool_calls` must be a list"),
        (called({"arguments": {}}), "needs a `name`"),
        (called({"name": "f", "arguments": "{"}), "the arguments of 'f' are not JSON"),
        (called({"name": "f", "arguments": [1]}), "must be an object"),
        (called({"name": "f", "arguments": {"x": 1e999}}), "cannot be written as JSON"),
        (answered(weight=-1), "`weight` must be a number of 0 or more, found -1"),
        (answered(weight=True), "`weight` must be a number"),
        ({"messages": [ASK, ANSWER], "tools": "{"}, "`tools` is a string that is not JSON"),
        ({"messages": [ASK, ANSWER], "tools": {"name": "f"}}, "`tools` must be a list"),
        ({"messages": [ASK, ANSWER], "tools": [{"description": "d"}]}, "tool 1 needs a `name`"),
        ({"messages": [ASK, ANSWER], "tool": []}, "the column 'tool' is unknown (did you mean 'tools'?)"),
    ],
)
def test_each_mistake_has_its_sentence(row: dict[str, Any], error: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(row)
    assert error in str(caught.value)


def test_rows_of_another_shape_are_named() -> None:
    shape = detect({"prompt": "p", "completion": "c"}, DataOptions())
    with pytest.raises(DataError, match=r"no column 'prompt'.*it looks like text, and one file holds one format"):
        read_row({"text": "t"}, shape)
    with pytest.raises(DataError, match=r"no column 'completion'.*\(did you mean 'completions'\?\)"):
        read_row({"prompt": "p", "completions": "c"}, shape)


def test_messages_come_in_one_form() -> None:
    given = [
        {"role": "developer", "content": "s", "id": 7},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}},
            {"name": "g"},
        ]},
        {"role": "function", "content": "r", "tool_call_id": "c1", "name": None},
    ]  # fmt: skip
    first, second, third = check_messages(given)
    assert first == {"role": "system", "content": "s"}
    assert second["content"] == ""
    assert calls_of(second) == [{"name": "f", "arguments": {"x": [1]}}, {"name": "g", "arguments": {}}]
    assert second["tool_calls"][0]["id"] == "c1"
    assert third == {"role": "tool", "content": "r", "tool_call_id": "c1"}


def test_tools_come_in_one_form() -> None:
    wanted = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert check_tools([{"name": "f", "parameters": {}}]) == wanted
    assert check_tools(wanted) == wanted
    assert check_tools([]) is None
    assert check_tools(None) is None
    assert check_tools("") is None
