"""Which columns a file has, and a row of them as a conversation, a prompt with its completion, or a text."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from postil.data.messages import Message, check_messages, check_tools
from postil.data.options import DataOptions
from postil.errors import DataError, listed, nearest


@dataclass(frozen=True, slots=True)
class Shape:
    """A known set of columns: those a row needs, those it may have, and the formats that read it."""

    label: str
    needs: tuple[str, ...]
    may: tuple[str, ...]
    formats: tuple[str, ...]


# In the order of trial: a file with both messages and prompt, or with output and text, is the earlier one.
SHAPES = (
    Shape("chat messages", ("messages",), ("tools", "system"), ("auto", "chat")),
    Shape("ShareGPT conversations", ("conversations",), ("tools", "system"), ("auto", "chat")),
    Shape("prompt and completion", ("prompt", "completion"), ("system",), ("auto", "prompt", "raw")),
    Shape("Alpaca", ("instruction", "output"), ("input", "system"), ("auto", "prompt", "raw")),
    Shape("text", ("text",), (), ("auto", "text")),
)
_OPTIONAL = {name for shape in SHAPES for name in shape.may}
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, checked, with the tools it may use."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt and the completion that is learned."""

    prompt: str
    completion: str
    system: str

    def as_chat(self) -> Chat:
        """A user turn and an assistant turn."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        user = {"role": "user", "content": self.prompt}
        return Chat([*system, user, {"role": "assistant", "content": self.completion}], None)


@dataclass(frozen=True, slots=True)
class Text:
    """A text that is learned whole."""

    text: str


def rename(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under postil's column names; DataError where a mapped column is missing that a row must have.

    One that rows may have (`input`, `system`, `tools`) is absent where a file's null was left out.
    """
    renamed = dict(row)
    for name, own in columns.items():
        if own not in row and name not in _OPTIONAL:
            raise DataError(f"no column {own!r}{nearest(own, row)}; the row has {listed(map(repr, row))}")
    for own in columns.values():
        renamed.pop(own, None)
    renamed.update({name: row[own] for name, own in columns.items() if own in row})
    return renamed


def check_mapped(columns: Mapping[str, str], known: Iterable[str]) -> None:
    """DataError for a mapped column that no row had; known: postil's names of the columns that rows did have."""
    names = list(known)
    for name, own in columns.items():
        if name not in names:
            raise DataError(
                f"columns: no row has anything in {own!r}{nearest(own, names)}, which stands for {name!r}; mend the "
                "name, or leave it out"
            )


def detect(row: Mapping[str, Any], options: DataOptions) -> Shape:
    """The shape of a (renamed) row among those `options.format` allows; DataError naming what was found."""
    allowed = [shape for shape in SHAPES if options.format in shape.formats]
    for shape in allowed:
        if all(name in row for name in shape.needs):
            return shape
    wanted = "; or ".join(" and ".join(shape.needs) for shape in allowed)
    hint = next((hint for name in row if (hint := nearest(name, _words(allowed)))), "")
    raise DataError(
        f"the columns {listed(map(repr, row))} are not known{hint}; wanted: {wanted}. "
        "Map other names with `columns`, for example {prompt: question, completion: answer}"
    )


def _words(shapes: list[Shape]) -> list[str]:
    return [name for shape in shapes for name in shape.needs]


def read_row(row: Mapping[str, Any], shape: Shape) -> Chat | Pair | Text:
    """A (renamed) row of the file's shape; DataError, without the place, saying what is wrong with it."""
    _check_columns(row, shape)
    if "text" in shape.needs:
        return Text(_string(row, "text", filled=True))
    if "completion" in shape.needs:
        return Pair(_string(row, "prompt"), _string(row, "completion", filled=True), _system(row))
    if "output" in shape.needs:
        extra = _string(row, "input") if row.get("input") is not None else ""
        prompt = _string(row, "instruction", filled=True) + (f"\n\n{extra}" if extra else "")
        return Pair(prompt, _string(row, "output", filled=True), _system(row))
    given = row["messages"] if "messages" in shape.needs else _from_sharegpt(row["conversations"])
    messages = check_messages(given)
    if (system := _system(row)) and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    _check_answers(messages)
    return Chat(messages, check_tools(row.get("tools")))


def _check_columns(row: Mapping[str, Any], shape: Shape) -> None:
    missing = [name for name in shape.needs if name not in row]
    if missing:
        other = next((s.label for s in SHAPES if all(name in row for name in s.needs)), None)
        hint = f"; it looks like {other}, and one file holds one format" if other else nearest(missing[0], row)
        raise DataError(
            f"no column {missing[0]!r}, which this file's rows have ({shape.label}); "
            f"the row has {listed(map(repr, row))}{hint}"
        )
    for name in row:
        absent = [known for known in shape.may if known not in row]
        if name not in (*shape.needs, *shape.may) and (
            close := difflib.get_close_matches(name, absent, n=1, cutoff=0.8)
        ):
            raise DataError(f"the column {name!r} is unknown (did you mean {close[0]!r}?)")


def _string(row: Mapping[str, Any], name: str, *, filled: bool = False) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise DataError(f"{name!r} must be a string, found {'null' if value is None else type(value).__name__}")
    if filled and not value.strip():
        raise DataError(f"{name!r} is empty")
    return value


def _system(row: Mapping[str, Any]) -> str:
    return _string(row, "system") if row.get("system") is not None else ""


def _check_answers(messages: list[Message]) -> None:
    answers = [number for number, message in enumerate(messages, start=1) if message["role"] == "assistant"]
    if not answers:
        raise DataError("`messages` has no assistant turn, so nothing would be learned")
    for number in answers:
        message = messages[number - 1]
        if not message["content"].strip() and not message.get("tool_calls"):
            raise DataError(f"message {number}: the assistant's content is empty")


def _from_sharegpt(turns: Any) -> list[Any]:
    if not isinstance(turns, list):
        raise DataError("`conversations` must be a list of {from, value}")
    return [_sharegpt_turn(number, turn) for number, turn in enumerate(turns, start=1)]


def _sharegpt_turn(number: int, turn: Any) -> Any:
    if not isinstance(turn, Mapping) or "role" in turn:
        return turn
    if "from" not in turn or "value" not in turn:
        raise DataError(f"message {number} must be an object with `from` and `value`")
    sender = turn["from"]
    if not isinstance(sender, str) or sender not in _SHAREGPT_ROLES:
        hint = nearest(sender.lower(), _SHAREGPT_ROLES) if isinstance(sender, str) else ""
        raise DataError(f"message {number}: unknown `from` {sender!r}{hint}; known: {listed(_SHAREGPT_ROLES)}")
    kept = {key: value for key, value in turn.items() if key not in ("from", "value")}
    if sender != "function_call":
        return {**kept, "role": _SHAREGPT_ROLES[sender], "content": turn["value"]}
    try:
        calls = json.loads(turn["value"])
    except (TypeError, ValueError):
        raise DataError(f"message {number}: the value of a function_call must be JSON") from None
    return {**kept, "role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
