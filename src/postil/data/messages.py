"""Messages and tools in one known form: roles, contents, tool calls, checked, with the nearest known word."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from postil.errors import DataError, listed, nearest

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_KEYS = (
    "role",
    "content",
    "tool_calls",
    "weight",
    "name",
    "tool_call_id",
    "reasoning_content",
    "thinking",
)


def check_messages(messages: Any) -> list[Message]:
    """Copies of `messages` in one form: known role, string content, tool calls with arguments as objects.

    Keys that no template reads are left out; a key that looks like a typing slip of a known one is an error.
    Raises DataError, naming the message by its 1-based number.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError("`messages` must be a list of at least one message")
    return [_message(number, message) for number, message in enumerate(messages, start=1)]


def _message(number: int, message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"message {number} must be an object with role and content")
    for key in message:
        if key not in _KEYS and (hint := nearest(str(key), _KEYS)):
            raise DataError(f"message {number} has the unknown key {key!r}{hint}")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        hint = nearest(role.lower(), ROLES) if isinstance(role, str) else ""
        raise DataError(f"message {number} has the unknown role {role!r}{hint}; known: {listed(ROLES)}")
    result: Message = {"role": ROLES[role], "content": _content(number, message)}
    if calls := message.get("tool_calls"):
        if ROLES[role] != "assistant":
            raise DataError(f"message {number} has tool_calls but the role {role!r}; only an assistant calls tools")
        if not isinstance(calls, Sequence) or isinstance(calls, str):
            raise DataError(f"message {number}: `tool_calls` must be a list")
        result["tool_calls"] = [_call(number, call) for call in calls]
    if message.get("weight") is not None:
        result["weight"] = _weight(number, message["weight"])
    for key in ("name", "tool_call_id", "reasoning_content", "thinking"):
        if message.get(key) is not None:
            if not isinstance(message[key], str):
                raise DataError(f"message {number}: `{key}` must be a string")
            result[key] = message[key]
    return result


def _content(number: int, message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if not isinstance(content, str):
        found = "nothing" if content is None else type(content).__name__
        raise DataError(f"message {number}: `content` must be a string, found {found}")
    return content


def _weight(number: int, weight: Any) -> float:
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise DataError(f"message {number}: `weight` must be a number of 0 or more, found {weight!r}")
    return float(weight)


def _call(number: int, call: Any) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise DataError(f"message {number}: a tool call needs a `name` and `arguments`")
    arguments = inner.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise DataError(f"message {number}: the arguments of {inner['name']!r} are not JSON") from None
    if not isinstance(arguments, Mapping):
        raise DataError(f"message {number}: the arguments of {inner['name']!r} must be an object")
    _strict_json(f"message {number}: the arguments of {inner['name']!r}", arguments)
    result: dict[str, Any] = {
        "type": "function",
        "function": {"name": inner["name"], "arguments": dict(arguments)},
    }
    if isinstance(call.get("id"), str):
        result["id"] = call["id"]
    return result


def check_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Tool definitions as `{"type": "function", "function": {"name", "description", "parameters"}}`, or None.

    Takes a list (or its JSON text) of that shape or of the bare inner objects; an empty list is None. Raises
    DataError.
    """
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "[]")
        except ValueError:
            raise DataError("`tools` is a string that is not JSON") from None
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise DataError("`tools` must be a list of tool definitions")
    return [_tool(number, tool) for number, tool in enumerate(tools, start=1)] or None


def _tool(number: int, tool: Any) -> dict[str, Any]:
    inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise DataError(f"tool {number} needs a `name`")
    _strict_json(f"tool {inner['name']!r}", inner)
    return {"type": "function", "function": dict(inner)}


def _strict_json(what: str, value: Mapping[str, Any]) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise DataError(f"{what} cannot be written as JSON ({problem})") from None


def calls_of(message: Message) -> list[dict[str, Any]]:
    """The calls of a checked message as a list of {"name", "arguments"}."""
    return [
        {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
        for call in message.get("tool_calls", [])
    ]
