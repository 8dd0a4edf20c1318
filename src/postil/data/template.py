"""A conversation as text: the base's chat template, and postil's one block for tools where it has none."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from postil.data.messages import Message, calls_of, check_messages, check_tools
from postil.errors import DataError

BLOCK_VERSION = "1"
BLOCK_HEAD = "You can call these tools:"
BLOCK_TAIL = (
    'To call a tool, answer with one line a call: <tool_call>{"name": ..., "arguments": {...}}</tool_call>\n'
    "Where no tool fits, answer in words."
)
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
_ANSWER = "Yes, 7 of them."
RESULT_OPEN, RESULT_CLOSE = "<tool_response>", "</tool_response>"

# Templates that print today's date (Llama 3.1 and later) would give other tokens every day.
FIXED_DATE = "26 Jul 2024"
_FIX_DATE = "{% macro strftime_now(format) %}" + FIXED_DATE + "{% endmacro %}"


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The conversation as one string, by the tokenizer's chat template; the same in training and serving.

    A template that knows `tools` is given tools, calls and results as they are. For any other, the
    definitions become a system text, a call becomes a line
    `<tool_call>{"name": ..., "arguments": ...}</tool_call>` of the assistant's content, and a result becomes
    a user turn `<tool_response>...</tool_response>`.
    With `add_generation_prompt` the text ends where the assistant's next answer begins.
    Raises DataError when the tokenizer has no template, or the template refuses the conversation.
    """
    return render_checked(check_messages(messages), tokenizer, check_tools(tools), add_generation_prompt)


def render_checked(
    messages: list[Message], tokenizer: Any, tools: list[dict[str, Any]] | None, add_generation_prompt: bool
) -> str:
    """As render, for messages and tools that check_messages and check_tools gave (or the empty list)."""
    source = template_source(tokenizer, tools)
    if knows_tools(source):
        plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        return _apply(plain, tokenizer, source, tools, add_generation_prompt)
    lowered = _lower(messages)
    if tools is None:
        return _apply(lowered, tokenizer, source, None, add_generation_prompt)
    block = tools_block(tools)
    try:
        text = _apply(_block_as_system(lowered, block), tokenizer, source, None, add_generation_prompt)
    except DataError:
        text = ""  # the template has no system turn
    if block in text:
        return text
    text = _apply(_block_before_user(lowered, block), tokenizer, source, None, add_generation_prompt)
    if block not in text:
        raise DataError("the chat template prints the tool definitions nowhere; give the base another template")
    return text


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token with which the chat template ends an assistant's turn; None where there is none."""
    if tokenizer is None or not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
    try:
        _, found, tail = render(turns, tokenizer).rpartition(_ANSWER)
    except DataError:
        return None
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids: list[int] = tokenizer(tail, add_special_tokens=False)["input_ids"] if found else []
    return next((token for token in ids if token in special), None)


def template_source(tokenizer: Any, tools: list[dict[str, Any]] | None = None) -> str:
    """The Jinja source that renders a conversation with these tools; DataError where there is none."""
    if not tokenizer.chat_template:
        raise DataError("the base has no chat template; use prompt/completion or text rows with `format: raw`")
    source: str = tokenizer.get_chat_template(tools=tools)
    return source


@functools.lru_cache(maxsize=16)
def knows_tools(source: str) -> bool:
    """Whether a template reads `tools` by itself (its comments do not count)."""
    return re.search(r"\btools\b", re.sub(r"\{#.*?#\}", "", source, flags=re.DOTALL)) is not None


def template_hash(tokenizer: Any) -> str | None:
    """SHA-256 (hex) over the chat template(s) and postil's tools block; None where there is no template."""
    if not tokenizer.chat_template:
        return None
    block = (BLOCK_VERSION, BLOCK_HEAD, BLOCK_TAIL, CALL_OPEN, CALL_CLOSE, RESULT_OPEN, RESULT_CLOSE)
    parts = (tokenizer.chat_template, *block, FIXED_DATE)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _apply(
    messages: list[Message],
    tokenizer: Any,
    source: str,
    tools: list[dict[str, Any]] | None,
    add_generation_prompt: bool,
) -> str:
    from jinja2 import TemplateError

    if "strftime_now" in source:
        source = _FIX_DATE + source
    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=source,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except (TemplateError, TypeError, ValueError) as problem:
        raise DataError(f"the chat template refuses the conversation ({problem})") from None
    return text


def tools_block(tools: list[dict[str, Any]]) -> str:
    """postil's system text for tools: one line of JSON a tool (name, description, parameters)."""
    lines = []
    for tool in tools:
        inner = tool["function"]
        kept = {key: inner[key] for key in ("name", "description", "parameters") if inner.get(key)}
        lines.append(json.dumps(kept, ensure_ascii=False, separators=(",", ":")))
    return "\n".join([BLOCK_HEAD, *lines, BLOCK_TAIL])


def call_line(name: str, arguments: Mapping[str, Any]) -> str:
    """One call as the assistant writes it."""
    return CALL_OPEN + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) + CALL_CLOSE


def render_tool_calls(content: str, calls: Sequence[Mapping[str, Any]]) -> str:
    """An assistant's content followed by its calls ({"name", "arguments"}), each on a line of its own."""
    lines = [call_line(call["name"], call["arguments"]) for call in calls]
    return "\n".join([content, *lines] if content else lines)


def parse_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The content and the calls of an answer: the inverse of render_tool_calls.

    What stands between the marks and is no JSON object with a name and an object of arguments stays content.
    """
    decoder = json.JSONDecoder()
    calls: list[dict[str, Any]] = []
    content, position = "", 0
    while (start := text.find(CALL_OPEN, position)) >= 0:
        found = _call_at(text, start + len(CALL_OPEN), decoder)
        if found is None:
            end = start + len(CALL_OPEN)
            content += text[position:end]
        else:
            call, end = found
            calls.append(call)
            content += text[position:start].removesuffix("\n")
        position = end
    return content + text[position:], calls


def _call_at(text: str, position: int, decoder: json.JSONDecoder) -> tuple[dict[str, Any], int] | None:
    while text[position : position + 1].isspace():
        position += 1
    try:
        value, position = decoder.raw_decode(text, position)
    except (ValueError, RecursionError):
        return None
    while text[position : position + 1].isspace():
        position += 1
    if not text.startswith(CALL_CLOSE, position) or not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return {"name": name, "arguments": arguments}, position + len(CALL_CLOSE)


def _lower(messages: list[Message]) -> list[Message]:
    """Calls and results as plain content, for a template that prints only content."""
    lowered: list[Message] = []
    in_results = False
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            content = RESULT_OPEN + content + RESULT_CLOSE
            if in_results:  # results of one round share a turn: many templates want turns to alternate
                lowered[-1]["content"] += "\n" + content
            else:
                lowered.append({"role": "user", "content": content})
        else:
            extra: Message = {
                key: message[key] for key in ("name", "reasoning_content", "thinking") if key in message
            }
            content = render_tool_calls(content, calls_of(message))
            lowered.append({"role": role, "content": content, **extra})
        in_results = role == "tool"
    return lowered


def _block_as_system(messages: list[Message], block: str) -> list[Message]:
    if messages and messages[0]["role"] == "system":
        system = messages[0]["content"]
        return [{"role": "system", "content": f"{system}\n\n{block}" if system else block}, *messages[1:]]
    return [{"role": "system", "content": block}, *messages]


def _block_before_user(messages: list[Message], block: str) -> list[Message]:
    for index, message in enumerate(messages):
        if message["role"] == "user":
            joined = {**message, "content": f"{block}\n\n{message['content']}"}
            return [*messages[:index], joined, *messages[index + 1 :]]
    return [{"role": "user", "content": block}, *messages]
