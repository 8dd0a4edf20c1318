"""Tool calls: exact, by name, valid, refused; the leaderboard's accept lists, rule by rule and on every real row."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from postil.data import render_tool_calls
from postil.errors import JudgeError
from postil.judging.metrics import metric_named

Rows = Callable[[str], list[dict[str, Any]]]
PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "price": {"type": "number"},
    "dry": {"type": "boolean"},
    "tags": {"type": "array", "items": {"type": "string"}},
    "sizes": {"type": "array", "items": {"type": "number"}},
    "limits": {"type": "object"},
    "steps": {"type": "array", "items": {"type": "object"}},
    "free": {"description": "of no stated type"},
}


def tool(name: str, required: tuple[str, ...] = ()) -> dict[str, Any]:
    schema = {"type": "object", "properties": PROPERTIES, "required": list(required)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def call(name: str = "find", **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def score(name: str, calls: list[dict[str, Any]] | str, row: dict[str, Any]) -> float | None:
    """100 or 0 for one answer, None where the row is not counted."""
    answer = calls if isinstance(calls, str) else render_tool_calls("", calls)
    ((value, count),) = metric_named(name).statistics([answer], [row]).tolist()
    assert count or not value
    return value if count else None


def is_accepted(lists: dict[str, list[Any]], required: tuple[str, ...] = (), **arguments: Any) -> bool:
    row = {"tools": [tool("find", required)], "accept": [{"name": "find", "arguments": lists}]}
    return score("exact_calls", [call(**arguments)], row) == 100


@pytest.mark.parametrize(
    ("lists", "arguments", "right"),
    [
        # strings: case, blanks and ,./-_*^ do not count, ' is "
        ({"city": ["New York, NY"]}, {"city": "new york NY"}, True),
        ({"city": ["it's"]}, {"city": 'IT"S'}, True),
        ({"city": ["Paris"]}, {"city": "Paris!"}, False),
        ({"city": ["Paris", "Rome"]}, {"city": "Rome"}, True),
        # left out, or empty, where "" is accepted
        ({"city": ["Paris", ""]}, {}, True),
        ({"city": ["Paris", ""]}, {"city": ""}, True),
        ({"city": ["Paris"]}, {}, False),
        ({"city": ["Paris"]}, {"city": "Paris", "days": 1}, False),
        ({"city": ["Paris"], "rooms": [1]}, {"city": "Paris", "rooms": 1}, False),  # unknown to the tool
        # numbers: an integer does for a number, not the other way
        ({"price": [5.0]}, {"price": 5}, True),
        ({"price": [5]}, {"price": 5.0}, True),
        ({"price": [5]}, {"price": 10**400}, False),
        ({"days": [5]}, {"days": 5.0}, False),
        ({"days": [5]}, {"days": "5"}, False),
        ({"days": [1]}, {"days": True}, False),
        ({"dry": [True]}, {"dry": True}, True),
        ({"dry": [True]}, {"dry": 1}, False),
        # a value of the accepted values' type, whatever the schema says, as it stands
        ({"days": ["dontcare"]}, {"days": "dontcare"}, True),
        ({"days": ["dontcare"]}, {"days": "DontCare"}, False),
        ({"days": ["", None]}, {"days": None}, True),
        ({"days": ["", None]}, {"days": 0}, False),
        # lists: in order, strings plain, items of one type
        ({"tags": [["A b", "c"]]}, {"tags": ["ab", "C"]}, True),
        ({"tags": [["a", "b"]]}, {"tags": ["b", "a"]}, False),
        ({"tags": [["a", "b"], ["b", "a"]]}, {"tags": ["b", "a"]}, True),
        ({"tags": [["a"]]}, {"tags": "a"}, False),
        ({"tags": [["a"], ""]}, {"tags": []}, True),
        ({"tags": [[1]]}, {"tags": [1]}, True),
        ({"tags": ["mine", ["A"]]}, {"tags": ["A"]}, True),
        ({"tags": ["mine", ["A"]]}, {"tags": ["a"]}, False),
        ({"sizes": [[1.0, 2.5]]}, {"sizes": [1.0, 2.5]}, True),
        ({"sizes": [[1.0, 2.5]]}, {"sizes": [1, 2.5]}, False),
        ({"sizes": [[1, 2]]}, {"sizes": [1.0, 2.0]}, True),
        # objects, and lists of them: key by key
        ({"limits": [{"low": [1, 2], "unit": ["", "cm"]}]}, {"limits": {"low": 2}}, True),
        ({"limits": [{"low": [1, 2], "unit": ["", "cm"]}]}, {"limits": {"low": 1, "unit": "CM"}}, True),
        ({"limits": [{"low": [1, 2], "unit": ["", "cm"]}]}, {"limits": {"unit": "cm"}}, False),
        ({"limits": [{"low": [1]}]}, {"limits": {"low": True}}, False),
        ({"limits": [{"low": [1]}]}, {"limits": {"low": 1, "high": 2}}, False),
        ({"steps": [[{"do": ["go"]}, {"do": ["stop"]}]]}, {"steps": [{"do": "Go"}, {"do": "stop"}]}, True),
        ({"steps": [[{"do": ["go"]}, {"do": ["stop"]}]]}, {"steps": [{"do": "stop"}, {"do": "go"}]}, False),
        ({"steps": [[{"do": ["go"]}]]}, {"steps": []}, False),
        # no type in the schema: that of the accepted values
        ({"free": ["A b"]}, {"free": "ab"}, True),
        ({"free": [3]}, {"free": "3"}, False),
    ],
)
def test_the_leaderboards_rules(lists: dict[str, list[Any]], arguments: dict[str, Any], right: bool) -> None:
    assert is_accepted(lists, **arguments) is right


def test_what_the_tool_requires_cannot_be_left_out() -> None:
    assert is_accepted({"city": ["Paris", ""]})
    assert not is_accepted({"city": ["Paris", ""]}, ("city",))


def test_parallel_calls_in_any_order_each_once() -> None:
    wishes = [
        {"name": "find", "arguments": {"city": ["Paris"]}},
        {"name": "find", "arguments": {"city": ["Rome", "Roma"]}},
        {"name": "book", "arguments": {}},
    ]
    row = {"tools": [tool("find"), tool("book")], "accept": wishes}
    calls = [call("book"), call(city="roma"), call(city="Paris")]
    assert score("exact_calls", calls, row) == 100
    assert score("exact_calls", calls[:2], row) == 0
    assert score("exact_calls", [*calls, call("book")], row) == 0
    assert score("exact_calls", [call("book"), call(city="Paris"), call(city="Paris")], row) == 0
    assert score("exact_calls", "I cannot.", row) == 0
    twice = {**row, "accept": [wishes[0], wishes[0]]}
    assert score("exact_calls", [call(city="Paris"), call(city="Rome")], twice) == 0
    assert score("exact_calls", [call(city="Paris"), call(city="Paris")], twice) == 100


def test_calls_without_accept_lists_are_equal_as_json() -> None:
    wanted = [call(days=1, tags=["a", {"b": None}]), call("book")]
    row = {"tools": [tool("find"), tool("book")], "calls": wanted}
    assert score("exact_calls", [call("book"), call(tags=["a", {"b": None}], days=1.0)], row) == 100
    assert score("exact_calls", "Yes.\n" + render_tool_calls("", wanted), row) == 100
    for days, tags in (
        (True, ["a", {"b": None}]),
        ("1", ["a", {"b": None}]),
        (1, ["a", {}]),
        (1, ["A", {"b": None}]),
    ):
        assert score("exact_calls", [call(days=days, tags=tags), call("book")], row) == 0


def test_names_alone() -> None:
    row = {"tools": [tool("find"), tool("book")], "calls": [call("find", days=1), call("book")]}
    assert score("call_names", [call("book", x=1), call("find")], row) == 100
    assert score("call_names", [call("book")], row) == 0
    assert score("call_names", [call("book"), call("book")], row) == 0
    assert score("call_names", "No.", {**row, "calls": []}) == 100


def test_a_broken_call_is_never_right() -> None:
    refuse = {"tools": [tool("find")], "calls": []}
    broken = '<tool_call>{"name": "find", "arguments": {"days": 1}'
    assert score("exact_calls", "No tool fits.", refuse) == 100
    assert score("refusals", "No tool fits.", refuse) == 100
    for name in ("exact_calls", "call_names", "refusals"):
        assert score(name, broken, refuse) == 0
        assert score(name, [call(days=1)], refuse) == 0
    row = {**refuse, "calls": [call(days=1)]}
    assert score("exact_calls", render_tool_calls(broken, [call(days=1)]), row) == 0
    assert score("refusals", broken, row) is None


TOOL_METRICS = ("exact_calls", "call_names", "valid_calls")
PLAIN = '{"name": "find", "arguments": {"days": 1}}'


@pytest.mark.parametrize(
    "completion",
    [
        PLAIN,
        f" {PLAIN}\n",
        f"[{PLAIN}]",
        '{"name": "find", "parameters": {"days": 1}}',
        '{"type": "function", "function": {"name": "find", "arguments": "{\\"days\\": 1}"}}',
        '{\n  "name": "find",\n  "arguments": {"days": 1}\n}',
    ],
)
def test_a_completion_that_is_a_call_as_json_wants_one(completion: str) -> None:
    row = {"prompt": "p", "completion": completion, "tools": [tool("find")]}
    for name in TOOL_METRICS:
        assert score(name, "banana", row) == 0
        assert score(name, completion, row) == 100
        assert score(name, [call(days=1)], row) == 100  # marked or not, a call is a call
    assert score("refusals", "banana", row) is None
    assert score("exact_calls", PLAIN, {**row, "completion": None, "calls": [call(days=1)]}) == 100
    assert score("refusals", completion, {"calls": []}) == 0
    two = {**row, "completion": f"{PLAIN}\n{PLAIN}"}
    assert score("exact_calls", f"[{PLAIN}, {PLAIN}]", two) == 100
    assert score("exact_calls", PLAIN, two) == 0


@pytest.mark.parametrize(
    "text", ["{}", "[]", "[1]", '{"name": 1, "arguments": {}}', '{"name": "f"}', '{"name": "f", "arguments": "x"}',
             f"{PLAIN}\nAnd more.", f"Here: {PLAIN}", "{" * 5000],
)  # fmt: skip
def test_json_that_is_no_call(text: str) -> None:
    assert score("refusals", text, {"calls": []}) == 100


def test_a_set_in_which_no_row_wants_a_call_is_refused() -> None:
    none = [{"prompt": "p", "completion": "banana"}, {"prompt": "p", "completion": '{"tool": "f", "args": {}}'}]
    wants = {"prompt": "p", "completion": PLAIN}
    lists = {"prompt": "p", "completion": "x", "accept": [{"name": "find", "arguments": {}}]}
    for name in TOOL_METRICS:
        with pytest.raises(JudgeError, match=f"{name} needs a row that wants a call, and no row does"):
            metric_named(name).look(none)
        for one in (wants, lists):
            assert metric_named(name).look([*none, one]) == []
    assert metric_named("refusals").look([*none, wants]) == []
    with pytest.raises(JudgeError, match="refusals needs a row that wants no call"):
        metric_named("refusals").look([wants, lists])


def test_accept_lists_alone_say_that_a_call_is_wanted() -> None:
    row = {"prompt": "p", "completion": "x", "tools": [tool("find")], "accept": [{"name": "find", "arguments": {}}]}
    assert score("refusals", "banana", row) is None
    assert score("call_names", "banana", row) == score("valid_calls", "banana", row) == 0
    assert score("call_names", [call()], row) == score("valid_calls", [call()], row) == 100


def test_a_wanted_call_that_cannot_be_read_is_named() -> None:
    row = {"prompt": "p", "completion": '<tool_call>{"name": "find", "arguments": {"days": 1}'}
    for name in ("exact_calls", "call_names", "refusals"):
        with pytest.raises(JudgeError, match=r"row 1: the wanted answer opens a call .* that cannot be read"):
            score(name, "banana", row)


def test_the_demos_own_rows_want_calls() -> None:
    from importlib.resources import files

    text = (files("postil.data") / "samples/demo/tools/test.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    for name in ("exact_calls", "call_names"):
        metric = metric_named(name)
        assert metric.look(rows) == []
        assert metric.value(metric.statistics(["banana"] * len(rows), rows).sum(axis=0)) == 0
        assert metric.value(metric.statistics([row["completion"] for row in rows], rows).sum(axis=0)) == 100


def test_valid_calls_keep_to_an_offered_tools_schema() -> None:
    row = {"tools": [tool("find", ("city",))], "calls": [call(city="Paris")]}
    assert score("valid_calls", [call(city="Oslo", days=3, price=2)], row) == 100
    assert score("valid_calls", [call(city="Oslo"), call(city="Bonn")], row) == 100
    assert score("valid_calls", [call(city="Oslo"), call(days=3)], row) == 0
    assert score("valid_calls", [call(city="Oslo", days="3")], row) == 0
    assert score("valid_calls", [call("fly", city="Oslo")], row) == 0
    assert score("valid_calls", "I cannot.", row) == 0
    assert score("valid_calls", "I cannot.", {**row, "calls": []}) is None


@pytest.mark.parametrize(
    ("name", "row", "wrong"),
    [
        ("exact_calls", {"accept": [{"find": {}}]}, 'an entry of `accept` must be {"name"'),
        ("exact_calls", {"accept": [{"name": "find", "arguments": {"a": 1}}]}, "`accept` of 'find' must hold one"),
        ("exact_calls", {"accept": [{}], "tools": [{"a": 1}]}, "tool 1 needs a `name`"),
        ("exact_calls", {"accept": [{}], "tools": [{"name": "f", "parameters": []}, {"name": "g", "parameters": 3}]},
         "`parameters` of the tool 'g' must be a JSON schema"),
        ("exact_calls", {"calls": "find()"}, "`calls` must be a list"),
        ("valid_calls", {"calls": [call()]}, "valid_calls needs the row's `tools`"),
        ("valid_calls", {"calls": [call()], "tools": [{"name": "find", "parameters": {"type": "dict"}}]},
         "the JSON schema is none: 'dict'"),
        ("valid_calls", {"calls": [call()], "tools": [tool("find", ()), {"name": "other", "parameters": {
            "properties": {"a": {"pattern": "(?<n>a)"}}}}]}, "is not a 'regex'"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_named(name: str, row: dict[str, Any], wrong: str) -> None:
    with pytest.raises(JudgeError) as problem:
        score(name, [call()], row)
    assert str(problem.value).startswith("row 1: ")
    assert wrong in str(problem.value)


def changed(value: Any, values: list[Any]) -> Any:
    """Another value of the same kind that no list of `values` holds."""
    if isinstance(value, str):
        return f"{value} zz"
    if isinstance(value, bool):
        return "zz" if (not value) in values else not value
    if isinstance(value, (int, float)):
        return next(value + step for step in range(1, 99) if value + step not in values)
    if isinstance(value, list):
        return [*value, *(value[:1] or ["zz"])]
    return {**value, "zz": 1} if isinstance(value, dict) else "zz"


def test_every_bfcl_row_accepts_its_own_calls_and_refuses_a_changed_argument(shared_rows: Rows) -> None:
    rows = [row for row in shared_rows("tool_calls/test.jsonl") if "accept" in row]
    exact, valid = metric_named("exact_calls"), metric_named("valid_calls")
    own = [render_tool_calls("", row["calls"]) for row in rows]
    assert len(rows) == 279
    assert exact.statistics(own, rows).mean(axis=0).tolist() == [100, 1]
    assert valid.statistics(own, rows).mean(axis=0).tolist() == [100, 1]
    answers, sources = [], []
    for row in rows:
        for place, (one, wish) in enumerate(zip(row["calls"], row["accept"], strict=True)):
            for name, value in one["arguments"].items():
                calls = copy.deepcopy(row["calls"])
                calls[place]["arguments"][name] = changed(value, wish["arguments"][name])
                answers.append(render_tool_calls("", calls))
                sources.append(row)
    assert len(answers) > 900
    assert not exact.statistics(answers, sources)[:, 0].any()


def test_every_tool_row_wants_what_its_own_message_says(shared_rows: Rows) -> None:
    rows = shared_rows("tool_calls/test.jsonl")
    own = [render_tool_calls(row["messages"][-1]["content"], row["calls"]) for row in rows]
    for name in ("exact_calls", "call_names", "valid_calls", "refusals"):
        metric = metric_named(name)
        assert metric.value(metric.statistics(own, rows).sum(axis=0)) == 100
    silent = metric_named("exact_calls").statistics(["Sorry."] * len(rows), rows)
    assert silent[:, 0].astype(bool).tolist() == [not row["calls"] for row in rows]
