"""Rendering: the base's template, postil's tools block, calls there and back, and the hash."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postil.data import parse_tool_calls, render, render_tool_calls, template_hash
from postil.data.template import BLOCK_HEAD, BLOCK_TAIL, CALL_OPEN, FIXED_DATE, knows_tools
from postil.errors import DataError

ASK = {"role": "user", "content": "Book a room."}
CALL = {"type": "function", "function": {"name": "book", "arguments": {"room": "Ä1", "at": "14:30"}}}
TOOLS = [{"type": "function", "function": {"name": "book", "description": "Book it", "parameters": {"a": 1}}}]
LINE = '<tool_call>{"name": "book", "arguments": {"room": "Ä1", "at": "14:30"}}</tool_call>'
TOOL_LINE = '{"name":"book","description":"Book it","parameters":{"a":1}}'


def test_chat_is_the_tokenizers_own_template(chatml: Any) -> None:
    messages = [ASK, {"role": "assistant", "content": "Done."}]
    assert render(messages, chatml) == chatml.apply_chat_template(messages, tokenize=False)
    assert render(messages, chatml, add_generation_prompt=True).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_the_block_where_the_template_knows_no_tools(chatml: Any) -> None:
    messages = [
        ASK,
        {"role": "assistant", "content": "One moment.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "ok"},
        {"role": "tool", "content": "ok too"},
        {"role": "assistant", "content": "Booked."},
    ]
    assert render(messages, chatml, tools=TOOLS) == (
        f"<|im_start|>system\n{BLOCK_HEAD}\n{TOOL_LINE}\n{BLOCK_TAIL}<|im_end|>\n"
        "<|im_start|>user\nBook a room.<|im_end|>\n"
        f"<|im_start|>assistant\nOne moment.\n{LINE}\n{LINE}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>ok</tool_response>\n"
        "<tool_response>ok too</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nBooked.<|im_end|>\n"
    )


def test_the_block_joins_a_system_text(chatml: Any) -> None:
    text = render([{"role": "system", "content": "Be brief."}, ASK], chatml, tools=TOOLS)
    assert text.startswith(f"<|im_start|>system\nBe brief.\n\n{BLOCK_HEAD}\n")
    assert text.count("<|im_start|>system") == 1


def test_the_block_goes_before_the_user_where_there_is_no_system_turn(llama2: Any) -> None:
    text = render([ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}], llama2, tools=TOOLS)
    block = f"{BLOCK_HEAD}\n{TOOL_LINE}\n{BLOCK_TAIL}"
    assert text == f"<s>[INST] {block}\n\nBook a room. [/INST] {LINE} </s>"


def test_a_template_that_drops_the_block_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="prints the tool definitions nowhere"):
        render([ASK], make_tokenizer("{{ messages | length }}"), tools=TOOLS)


def test_a_template_that_knows_tools_gets_them_as_they_are(native: Any) -> None:
    text = render([ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}], native, tools=TOOLS)
    assert text.startswith("TOOLS " + json.dumps(TOOLS) + "\n")
    assert "CALL " + json.dumps(CALL["function"], ensure_ascii=False) in text
    assert BLOCK_HEAD not in text


def test_knowing_tools_is_not_a_comment() -> None:
    assert knows_tools("{% if tools %}")
    assert not knows_tools("{# no\ntools #}{{ messages }} toolset")


def test_weight_never_reaches_the_template(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.keys() | list }}{% endfor %}{# #}{{ tools }}")
    assert "weight" not in render([{**ASK, "weight": 1}], tokenizer)


def test_errors_are_one_sentence(llama2: Any, make_tokenizer: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"the chat template refuses the conversation \(no system turn here\)"):
        render([{"role": "system", "content": "s"}, ASK], llama2)
    with pytest.raises(DataError, match="the base has no chat template"):
        render([ASK], make_tokenizer(None))
    with pytest.raises(DataError, match=r"message 1 has the unknown role 'usr'"):
        render([{"role": "usr", "content": ""}], llama2)


def test_todays_date_is_fixed(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("{{ strftime_now('%d %b %Y') }}|{{ messages[0].content }}")
    assert render([ASK], tokenizer) == f"{FIXED_DATE}|Book a room."


def test_the_hash_follows_template_and_block(
    chatml: Any, llama2: Any, make_tokenizer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = template_hash(chatml)
    assert first is not None
    assert len(first) == 64
    assert first == template_hash(make_tokenizer())
    assert first != template_hash(llama2)
    assert template_hash(make_tokenizer(None)) is None
    monkeypatch.setattr("postil.data.template.BLOCK_TAIL", "other")
    assert first != template_hash(chatml)


_names = st.text(min_size=1, max_size=8)
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
_calls = st.lists(
    st.fixed_dictionaries({"name": _names, "arguments": st.dictionaries(st.text(), _values, max_size=3)}),
    max_size=3,
)
_words = st.text() | st.sampled_from(["a\n", "\n", "</tool_call>", '{"name": "f"}', "a\x85b\u2028c"])


@given(_words.filter(lambda text: CALL_OPEN not in text), _calls)
def test_calls_there_and_back(content: str, calls: list[dict[str, Any]]) -> None:
    assert parse_tool_calls(render_tool_calls(content, calls)) == (content, calls)


@given(st.text(alphabet='<tool_cal>/{}"name:rgus, \n') | st.text())
def test_parsing_takes_any_text(text: str) -> None:
    content, calls = parse_tool_calls(text)
    if not calls:
        assert content == text


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{}</tool_call>",
        '<tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {}}',
        '<tool_call>{"name": "f", "arguments": {',
        "<tool_call>[1]</tool_call>",
        "<tool_call>",
    ],
)
def test_what_is_no_call_stays_content(text: str) -> None:
    assert parse_tool_calls(text) == (text, [])
    assert parse_tool_calls(text + "\n" + LINE)[1] == [CALL["function"]]


def test_calls_may_stand_loosely() -> None:
    text = (
        'Sure.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
        '<tool_call>{"arguments": {"a": 1}, "name": "g"}</tool_call> Done.'
    )
    assert parse_tool_calls(text) == (
        "Sure. Done.",
        [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"a": 1}}],
    )
