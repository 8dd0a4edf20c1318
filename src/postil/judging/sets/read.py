"""Rows of a set to judge on: read whole, each with its number, and the digest of those that were used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from postil import seeds
from postil.data.encode import check_text
from postil.data.rows import BadRow, Row, Source, open_source
from postil.data.shipped import NAMES, shipped_rows
from postil.errors import DataError, listed, nearest
from postil.judging.card.model import DataUsed

From = str | Path | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows by their numbers (1-based lines or rows) and the name of where they are from."""

    name: str
    rows: tuple[Row, ...]
    source: Source

    def where(self, row: Row) -> str:
        """`test.jsonl:7`, for messages."""
        return self.source.where(row.number)


def read_rows(source: From) -> Rows:
    """Every row of a file or list. Raises DataError naming the first bad line, or that there is none."""
    opened = open_source(source)
    rows: list[Row] = []
    for row in opened.rows:
        if isinstance(row, BadRow):
            raise DataError(f"{opened.where(row.number)}: {row.error}; a set to judge on must be whole, so mend it.")
        rows.append(row)
    if not rows:
        raise DataError(f"{opened.name} is empty: it has no row.")
    return Rows(opened.name, tuple(rows), opened)


def shipped_text() -> Rows:
    """The general sample that comes with postil."""
    rows = read_rows(shipped_rows("general"))
    return Rows(NAMES["general"], rows.rows, rows.source)


def used(name: str, rows: Sequence[Row], tokens: int | None = None) -> DataUsed:
    """What the card says of rows: the SHA-256 over each as one line of JSON with sorted keys."""
    digest = hashlib.sha256()
    for row in rows:
        line = json.dumps(row.value, sort_keys=True, ensure_ascii=False, default=str) + "\n"
        digest.update(line.encode("utf-8", errors="backslashreplace"))
    return DataUsed(name=name, sha256=digest.hexdigest(), rows=len(rows), tokens=tokens)


def check_texts(rows: Rows, row: Row, texts: Iterable[str]) -> None:
    """Raise DataError naming the line where one of its texts is none that can be tokenised."""
    try:
        for text in texts:
            check_text(text)
    except DataError as problem:
        raise DataError(f"{rows.where(row)}: {problem}.") from None


def column_of(rows: Rows, row: Row, name: str) -> Any:
    """The value of a row's column. Raises DataError naming the line and the nearest column."""
    if name not in row.value:
        near = nearest(name, row.value) or f"; the row has {listed(map(repr, row.value))}"
        raise DataError(f"{rows.where(row)}: no column {name!r}{near}.")
    return row.value[name]


def chosen(count: int, limit: int | None, seed: int, *names: str | int) -> list[int]:
    """`limit` of `count` places (None: all), by chance from the seed, in ascending order."""
    if limit is None or limit >= count:
        return list(range(count))
    generator = np.random.Generator(np.random.PCG64(seeds.derive(seed, "chosen", *names)))
    return sorted(int(place) for place in generator.permutation(count)[:limit])
