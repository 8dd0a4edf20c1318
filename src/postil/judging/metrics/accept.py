"""Whether a tool call is the wanted one: equal as JSON, or among the values that a row's `accept` lists allow."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from postil.errors import JudgeError

Call = Mapping[str, Any]  # {"name", "arguments"}

_IGNORED = re.compile(r"[ ,./\-_*^]")
_KINDS: dict[str, type] = {
    "string": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
    "object": dict,
}
OMITTED = ""  # in a list of accepted values: the argument may be left out


def same(first: Any, second: Any) -> bool:
    """Equality of JSON values: 1 equals 1.0, and true is no number."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def accepted(call: Call, wish: Any, schema: Mapping[str, Any] | None) -> bool:
    """Whether a call fits one entry of `accept`: {"name", "arguments": {argument: [accepted values]}}.

    These are the rules of the Berkeley Function Calling Leaderboard's AST check for Python (S. Patil et al.), on JSON
    schema types. Every argument must be known to the tool and to the wish and have an accepted value; one may be
    left out where its list holds "" and the tool does not require it. A value must have the schema's type, or that
    of the first accepted value; an integer does where a number is asked (not inside a list). Strings, also in lists
    and objects, are compared in lower case without blanks and ``,./-_*^``, with ' for ". An object is accepted key by
    key, each with its own list. One rule is stricter than theirs: true and 1 are never the same.
    schema: the tool's parameters, None where the row does not tell them. Raises JudgeError for a wish of another
    form.
    """
    if not isinstance(wish, Mapping) or not isinstance(wish.get("name"), str):
        raise JudgeError('an entry of `accept` must be {"name": ..., "arguments": {argument: [values]}}')
    lists = wish.get("arguments")
    if not isinstance(lists, Mapping) or not all(isinstance(values, list) for values in lists.values()):
        raise JudgeError(f"`accept` of {wish['name']!r} must hold one list of values an argument")
    arguments = call["arguments"]
    if call["name"] != wish["name"]:
        return False
    if any(name not in arguments and OMITTED not in values for name, values in lists.items()):
        return False
    if any(name not in arguments for name in (schema or {}).get("required") or ()):
        return False
    known = lists if schema is None else schema.get("properties") or {}
    return all(
        name in known and name in lists and _value_accepted(value, lists[name], known[name])
        for name, value in arguments.items()
    )


def _value_accepted(value: Any, values: Sequence[Any], schema: Any) -> bool:
    example = _example(values)
    kind = _kind(schema) or example
    typed = float if kind is float and type(value) is int else type(value)
    if typed is not kind:  # then of the accepted values' type, and one of them as it stands
        return typed is example and _among(value, values)
    inner = _kind(schema.get("items")) if kind is list and isinstance(schema, Mapping) else None
    if inner is not None and not _items_typed(value, values, inner):
        return False
    if example not in (None, kind):
        return _among(value, values)
    if kind is str:
        return _plain(value) in {_plain(one) for one in values if isinstance(one, str)}
    if kind is dict:
        return any(_object_accepted(value, one) for one in values)
    if kind is list and inner is dict:
        return any(_objects_accepted(value, one) for one in _lists(values))
    if kind is list:
        return any(same([_plain(item) for item in value], [_plain(item) for item in one]) for one in _lists(values))
    return _among(value, values)


def _kind(schema: Any) -> Any:
    """The Python type of a JSON schema's one type, or None."""
    named = schema.get("type") if isinstance(schema, Mapping) else None
    return _KINDS.get(named) if isinstance(named, str) else None


def _example(values: Sequence[Any]) -> Any:
    """The Python type of the first accepted value that is one, or None."""
    return next((type(one) for one in values if one != OMITTED), None)


def _items_typed(value: Sequence[Any], values: Sequence[Any], inner: type) -> bool:
    """Whether all items have the schema's type, or that of the first item, for one of the accepted lists."""
    return any(
        not isinstance(one, list) or all(type(item) in (inner, _example(one)) for item in value) for one in values
    )


def _lists(values: Sequence[Any]) -> list[list[Any]]:
    """The accepted values that are lists; what may be left out may be empty too."""
    return [[] if one == OMITTED else one for one in values if one == OMITTED or isinstance(one, list)]


def _object_accepted(value: Mapping[str, Any], lists: Any) -> bool:
    if not isinstance(lists, Mapping) or not all(isinstance(values, list) for values in lists.values()):
        return False
    if any(key not in value and OMITTED not in values for key, values in lists.items()):
        return False
    return all(key in lists and _among(_plain(item), map(_plain, lists[key])) for key, item in value.items())


def _objects_accepted(value: Sequence[Any], one: Any) -> bool:
    return len(value) == len(one) and all(
        isinstance(item, Mapping) and _object_accepted(item, lists) for item, lists in zip(value, one, strict=True)
    )


def _among(value: Any, values: Any) -> bool:
    return any(same(value, one) for one in values)


def _plain(value: Any) -> Any:
    """A string without case and what the leaderboard ignores; anything else as it is."""
    return _IGNORED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value
