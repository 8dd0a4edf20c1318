"""What a row asks and wants, and the shares and means that most measures are, with errors that name the row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from postil.data import parse_tool_calls, render_tool_calls
from postil.data.formats import Chat, Pair, detect, read_row
from postil.data.messages import calls_of
from postil.data.options import DataOptions
from postil.data.template import CALL_OPEN
from postil.errors import DataError, JudgeError, nearest
from postil.judging.metrics.metric import Look, Metric, Row, Statistics, mean_of

Score = Callable[[str, Row], float | None]
_OPTIONS = DataOptions()


def wanted(row: Row) -> list[str]:
    """The answers that a row counts as right, at least one, for measures on text.

    `references` (a list of strings) where rows were grouped; else `accept`, if it is a list of strings; else what
    training would learn: the completion, or the last assistant message's content followed by its tool calls.
    Raises JudgeError where the row has none of them.
    """
    for column in ("references", "accept"):
        texts = row.get(column)
        if column == "accept" and not _are_texts(texts):
            continue  # the accept lists of tool calls are another thing
        if texts is not None:
            if not _are_texts(texts):
                raise JudgeError(f"`{column}` must be a list of at least one string, found {texts!r:.80}")
            return list(texts)
    return [_answer(row)]


def asked(row: Row) -> str:
    """The prompt of a row, or its last user message. Raises JudgeError where there is none."""
    if isinstance(row.get("prompt"), str):
        return str(row["prompt"])
    known = _conversation(row)
    if isinstance(known, Pair):
        return known.prompt
    asking = [message["content"] for message in known.messages if message["role"] == "user"]
    if not asking:
        raise JudgeError("the row has neither a prompt nor a user message")
    return str(asking[-1])


def wanted_calls(row: Row) -> list[dict[str, Any]]:
    """The tool calls ({"name", "arguments"}) that answer a row; none where no tool fits.

    `calls` where the row has it, else those of the last assistant message, or written in the completion: between
    postil's marks, or as JSON and nothing else. Raises JudgeError for a marked call that cannot be read.
    """
    if (calls := row.get("calls")) is not None:
        if not isinstance(calls, Sequence) or not all(_is_call(call) for call in calls):
            raise JudgeError('`calls` must be a list of {"name": ..., "arguments": {...}}')
        return [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    calls = calls_in(_answer(row))
    if calls is None:
        raise JudgeError(f"the wanted answer opens a call ({CALL_OPEN}) that cannot be read: {_answer(row)!r:.80}")
    return calls


def calls_in(answer: str) -> list[dict[str, Any]] | None:
    """The calls of an answer, or None where it opens one that cannot be read: a broken call is never right.

    Marked ones, or an answer that is calls as JSON and nothing else: an object {"name", "arguments"} (or
    "parameters", as some templates call them), a list of such, or one a line.
    """
    content, calls = parse_tool_calls(answer)
    return None if CALL_OPEN in content else calls or _bare_calls(answer)


def _bare_calls(answer: str) -> list[dict[str, Any]]:
    text = answer.strip()
    if text[:1] not in ("{", "["):
        return []
    whole = _json(text)
    values = [_json(line) for line in text.splitlines() if line.strip()] if whole is None else whole
    calls = [_bare_call(value) for value in (values if isinstance(values, list) else [values])]
    return [call for call in calls if call is not None] if None not in calls else []


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _bare_call(value: Any) -> dict[str, Any] | None:
    call = value["function"] if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping) else value
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters"))
    arguments = _json(arguments) if isinstance(arguments, str) else arguments
    return {"name": call["name"], "arguments": arguments} if isinstance(arguments, Mapping) else None


def _is_call(call: Any) -> bool:
    return (
        isinstance(call, Mapping) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), Mapping)
    )


def _are_texts(texts: Any) -> bool:
    return isinstance(texts, Sequence) and not isinstance(texts, str) and bool(texts) and all(
        isinstance(text, str) for text in texts
    )  # fmt: skip


def _answer(row: Row) -> str:
    if "messages" not in row and isinstance(row.get("completion"), str):
        return str(row["completion"])
    known = _conversation(row)
    if isinstance(known, Pair):
        return known.completion
    answer = known.messages[-1]
    return render_tool_calls(answer["content"], calls_of(answer))


def _conversation(row: Row) -> Chat | Pair:
    try:
        known = read_row(row, detect(row, _OPTIONS))
    except DataError as problem:
        raise JudgeError(str(problem)) from None
    if not isinstance(known, (Chat, Pair)):
        raise JudgeError("a row of text alone wants no answer; it can be judged by its loss only")
    if isinstance(known, Chat) and known.messages[-1]["role"] != "assistant":
        raise JudgeError("the last message must be the assistant's: it is the answer that is wanted")
    return known


def column_of(row: Row, column: str) -> Any:
    """The value of a column. Raises JudgeError naming the nearest column where the row lacks it."""
    if row.get(column) is None:
        raise JudgeError(f"no column {column!r}{nearest(column, row)}")
    return row[column]


def numbered(answers: Sequence[str], rows: Sequence[Row]) -> Iterator[tuple[int, str, Row]]:
    """(1-based number, answer, row). Raises JudgeError where the two do not have the same length."""
    if len(answers) != len(rows):
        raise JudgeError(f"{len(answers)} answers were given for {len(rows)} rows; each row needs one")
    for number, (answer, row) in enumerate(zip(answers, rows, strict=True), start=1):
        yield number, answer, row


def each(answers: Sequence[str], rows: Sequence[Row], score: Callable[[str, Row], Any]) -> list[Any]:
    """score(answer, row) for every row; a JudgeError from it is raised again with the row's number."""
    scores = []
    for number, answer, row in numbered(answers, rows):
        try:
            scores.append(score(answer, row))
        except JudgeError as problem:
            raise JudgeError(f"row {number}: {problem}") from None
    return scores


def means(score: Score, *, scale: float = 1.0) -> Callable[[Sequence[str], Sequence[Row]], Statistics]:
    """Statistics [rows, 2] of (scale · score, 1); (0, 0) for a row whose score is None: it is not counted."""

    def statistics(answers: Sequence[str], rows: Sequence[Row]) -> Statistics:
        scores = each(answers, rows, score)
        pairs = [(0.0, 0.0) if value is None else (scale * float(value), 1.0) for value in scores]
        return np.array(pairs, dtype=np.float64).reshape(-1, 2)

    return statistics


def share(name: str, score: Score, look: Look = lambda _: ()) -> Metric:
    """The percentage of counted rows for which `score` holds."""
    return Metric(name, "higher", "%", means(score, scale=100), mean_of, look)


def points(name: str, score: Score, look: Look = lambda _: ()) -> Metric:
    """The mean of a score of 0 to 1, as points of 0 to 100."""
    return Metric(name, "higher", "points", means(score, scale=100), mean_of, look)
