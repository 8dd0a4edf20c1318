"""Rows read as examples, and the rows that an adapter was trained on: worked examples, and what baselines know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postil.data import DataOptions
from postil.data.encode import check_text
from postil.data.formats import Chat, Pair, Shape, Text, detect, read_row, rename
from postil.data.rows import BadRow, Row, open_source
from postil.errors import DataError, JudgeError
from postil.files import sha256_file
from postil.judging.metrics.wanted import wanted
from postil.judging.sets.read import From


@dataclass(frozen=True, slots=True)
class Example:
    """A row as it was read. value: under postil's column names; references: the answers that it counts as right;
    key: equal for rows that ask the same, whatever columns they ask it in."""

    row: Row
    value: dict[str, Any]
    example: Chat | Pair | Text
    references: list[str]
    key: str


@dataclass(frozen=True, slots=True)
class Training:
    """Rows like those that an adapter learned. asked_for: whether the user named them, or the recipe did."""

    name: str
    examples: tuple[Example, ...]
    asked_for: bool = True


def example_of(row: Row, shape: Shape | None, options: DataOptions) -> tuple[Example, Shape]:
    """The row read as its file's shape (None: as it looks), and that shape. Raises DataError, JudgeError."""
    value = rename(row.value, options.columns)
    if "completion" not in value and "prompt" in value and "references" in value:
        value["completion"] = next((text for text in wanted(value) if text.strip()), "")
        if not value["completion"]:
            raise DataError("`references` holds empty texts alone, and one that is scored must say something")
    shape = shape or detect(value, options)
    example = read_row(value, shape)
    references = [] if isinstance(example, Text) else wanted(value)
    for text in references:
        check_text(text)
    return Example(row, value, example, references, question_key(example)), shape


def question_key(example: Chat | Pair | Text) -> str:
    """Equal for rows that ask the same, whatever columns they ask it in and whatever weights training gave turns."""
    if isinstance(example, Text):
        return ""
    messages, tools = conversation(example)
    asked = [{key: value for key, value in one.items() if key != "weight"} for one in messages[:-1]]
    return json.dumps([asked, tools], sort_keys=True)


def conversation(example: Chat | Pair | Text) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The messages and tools of a row that answers something."""
    chat = example.as_chat() if isinstance(example, Pair) else example
    assert isinstance(chat, Chat)
    return chat.messages, chat.tools


def recipe_file(recipe: Mapping[str, Any], data: Mapping[str, Any]) -> Path | None:
    """The training file that a recipe names, where it is still there with the bytes that were learned.

    data: the adapter's own account of its data, with their SHA-256.
    """
    named, sha256 = recipe.get("data"), data.get("sha256")
    if not isinstance(named, str) or not isinstance(sha256, str) or not Path(named).is_file():
        return None
    return Path(named) if sha256_file(Path(named)) == sha256 else None


def read_training(source: From, options: DataOptions, target: str, *, asked_for: bool) -> tuple[Training | None, str]:
    """The rows of a training file as examples for a target of a format ("chat", "prompt", "raw"), and a note.

    Rows that the user asked for must be whole and of the target's kind: DataError for a bad line, JudgeError for
    another kind. A recipe's are taken as far as they can be read; None where they are of another kind.
    """
    opened = open_source(source)
    shape: Shape | None = None
    examples, bad = list[Example](), 0
    for row in opened.rows:
        try:
            if isinstance(row, BadRow):
                raise DataError(row.error)
            found, shape = example_of(row, shape, options)
            examples.append(found)
        except (DataError, JudgeError) as problem:
            if asked_for:
                raise DataError(f"{opened.where(row.number)}: {problem}") from None
            bad += 1
    other = any(isinstance(one.example, Text) for one in examples) or (
        target == "raw" and any(isinstance(one.example, Chat) for one in examples)
    )
    if other or not examples:
        text = any(isinstance(one.example, Text) for one in examples)
        kind = f"holds rows of format {'text' if text else 'chat'}" if examples else "holds no row"
        said = (
            f"{opened.name} {kind}, which are no examples for a target of format {target}; "
            "draw examples from rows like the target's"
        )
        if asked_for:
            raise JudgeError(said)
        return None, ""
    left_out = f" ({bad:,} rows of it could not be read)" if bad else ""
    note = "" if asked_for else (
        f"few-shot examples and baselines are from the rows that the recipe names, {opened.name}{left_out}; "
        "--shots 0 leaves the examples out"
    )  # fmt: skip
    return Training(opened.name, tuple(examples), asked_for), note
