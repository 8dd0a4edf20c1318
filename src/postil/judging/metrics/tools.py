"""Measures of tool calls: parsed from the answer, matched by name and arguments, kept to the tools' schemas."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from postil.data.messages import check_tools
from postil.errors import DataError, JudgeError
from postil.judging.metrics.accept import Call, accepted, same
from postil.judging.metrics.metric import Look, Metric, Row
from postil.judging.metrics.options import Given, NoOptions, chosen
from postil.judging.metrics.structure import checked, fits, schema_text
from postil.judging.metrics.wanted import calls_in, each, share, wanted_calls


def exact_calls(given: Given) -> Metric:
    """The percentage of answers with exactly the wanted calls, in any order; no call where none is wanted.

    Where the row has `accept` lists, a call may have any of the accepted values (see accept.py). Without them,
    arguments must be equal as JSON (1 equals 1.0, and true is no number).
    """
    chosen(NoOptions, given)

    def right(answer: str, row: Row) -> bool:
        calls = calls_in(answer)
        if calls is None:
            return False
        if (accept := _lists(row)) is not None:
            tools = _tools(row)
            return _matched(calls, accept, lambda call, wish: accepted(call, wish, tools.get(call["name"])))
        return _matched(calls, wanted_calls(row), same)

    return share("exact_calls", right, _some_wanted("exact_calls"))


def call_names(given: Given) -> Metric:
    """The percentage of answers that call exactly the wanted tools, in any order, whatever the arguments."""
    chosen(NoOptions, given)

    def right(answer: str, row: Row) -> bool:
        calls = calls_in(answer)
        wishes = wanted_calls(row) if _lists(row) is None else _lists(row) or ()
        return calls is not None and _names(calls) == _names(wishes)

    return share("call_names", right, _some_wanted("call_names"))


def valid_calls(given: Given) -> Metric:
    """The percentage of answers whose calls, one at least, all name an offered tool and keep to its JSON schema.

    Only rows that want a call are counted.
    """
    chosen(NoOptions, given)

    def right(answer: str, row: Row) -> bool | None:
        if not wants_call(row):
            return None
        tools = _tools(row)
        if not tools:
            raise JudgeError("valid_calls needs the row's `tools` with their JSON schemas")
        schemas = {name: checked(schema_text(schema)) for name, schema in tools.items()}
        calls = calls_in(answer)
        return bool(calls) and all(
            call["name"] in schemas and fits(schemas[call["name"]], call["arguments"]) for call in calls or []
        )

    return share("valid_calls", right, _some_wanted("valid_calls"))


def refusals(given: Given) -> Metric:
    """The percentage of rows that no tool fits whose answer makes no call, and tries none."""
    chosen(NoOptions, given)

    def look(rows: Sequence[Row]) -> list[str]:
        if all(_wishes(rows)):
            raise JudgeError(
                "refusals needs a row that wants no call, and here every row wants one; take exact_calls"
            )
        return []

    return share("refusals", lambda answer, row: None if wants_call(row) else calls_in(answer) == [], look)


def _some_wanted(name: str) -> Look:
    """An answer without any call would be right in every row of a set that wants none."""

    def look(rows: Sequence[Row]) -> list[str]:
        if not any(_wishes(rows)):
            raise JudgeError(
                f"{name} needs a row that wants a call, and no row does: calls stand in the last message's "
                '`tool_calls`, in `calls`, or in the completion as JSON {"name", "arguments"}; take another metric, '
                "for example refusals or exact_match"
            )
        return []

    return look


def _wishes(rows: Sequence[Row]) -> list[bool]:
    """Whether each row wants a call."""
    return each([""] * len(rows), rows, lambda _, row: wants_call(row))


def wants_call(row: Row) -> bool:
    """Whether a row's right answer is a call."""
    return _lists(row) is not None or bool(wanted_calls(row))


def _lists(row: Row) -> Sequence[Any] | None:
    """The row's `accept` lists of calls."""
    accept = row.get("accept")
    return accept if isinstance(accept, Sequence) and any(isinstance(one, Mapping) for one in accept) else None


def _matched(calls: Sequence[Call], wishes: Sequence[Any], fit: Callable[[Call, Any], bool]) -> bool:
    """Whether each wish, in turn, takes one call that fits and is left, and none is left over."""
    if len(calls) != len(wishes):
        return False
    left = list(calls)
    for wish in wishes:
        found = next((i for i, call in enumerate(left) if fit(call, wish)), None)
        if found is None:
            return False
        del left[found]
    return True


def _names(calls: Sequence[Call]) -> Counter[str]:
    return Counter(call["name"] for call in calls)


def _tools(row: Row) -> dict[str, Mapping[str, Any]]:
    """The JSON schema of the arguments of each offered tool, by name."""
    try:
        tools = check_tools(row.get("tools")) or []
    except DataError as problem:
        raise JudgeError(str(problem)) from None
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
    for name, schema in schemas.items():
        if not isinstance(schema, Mapping) or not isinstance(schema.get("properties", {}), Mapping):
            raise JudgeError(f"the `parameters` of the tool {name!r} must be a JSON schema with `properties`")
    return schemas
