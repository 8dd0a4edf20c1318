"""Reading rows: JSONL (plain, .gz, .zst), a JSON array, Parquet, a hub name or a list, each row numbered."""

from __future__ import annotations

import gzip
import importlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postil.errors import DataError, listed, nearest

MAX_LINE = 64 << 20  # bytes; a longer line is refused by name
_CHUNK = 1 << 20  # bytes read at once
_UTF8_BOM = b"\xef\xbb\xbf"
_UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
_KEEP_OF_HUGE = 200  # bytes of a refused line that the side file shows
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>\w[\w\[\]:%+]*))?")


@dataclass(frozen=True, slots=True)
class Row:
    """One object read; `number` is its 1-based line (JSONL) or row."""

    number: int
    value: dict[str, Any]

    @property
    def text(self) -> str:
        """The row as one JSON line."""
        return json.dumps(self.value, ensure_ascii=False, default=str)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A line or row that cannot be used: what is wrong, and its text as far as it could be read."""

    number: int
    error: str
    text: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows come from: a name for messages, the file if there is one, and the rows, read once."""

    name: str
    path: Path | None
    by_line: bool
    rows: Iterator[Row | BadRow]

    def where(self, number: int) -> str:
        """`train.jsonl:7`, or `train.parquet, row 7` where rows are not lines."""
        return f"{self.name}:{number}" if self.by_line else f"{self.name}, row {number}"


def open_source(source: str | Path | Sequence[Mapping[str, Any]]) -> Source:
    """Open a file, a hub data set (`owner/name[/config][:split]`) or a list of rows.

    Raises DataError for a missing, unreadable or unknown kind of source; rows that are wrong by themselves
    come as BadRow. A damaged file raises DataError while it is being read.
    """
    if not isinstance(source, (str, Path)):
        return Source("the given rows", None, False, _listed_rows(source))
    path = Path(source)
    if path.is_dir():
        raise DataError(f"{path} is a directory; name one file in it ({', '.join(_SUFFIXES)}, also .gz or .zst).")
    if path.exists():
        return _open_file(path)
    hub = _HUB_NAME.fullmatch(str(source))
    if hub is None or _inner_suffix(path) in _SUFFIXES or Path(hub["name"]).parent.exists():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path} does not exist{nearest(path.name, beside)}.")
    return Source(str(source), None, False, _hub_rows(hub["name"], hub["config"], hub["split"] or "train"))


def _open_file(path: Path) -> Source:
    inner = _inner_suffix(path)
    if inner == ".parquet":
        return Source(str(path), path, False, _parquet_rows(path))
    if inner not in _SUFFIXES:
        raise DataError(f"{path}: {inner or 'a file without suffix'} is not read; use one of {', '.join(_SUFFIXES)}.")
    if inner == ".json" and _starts_array(path):
        return Source(str(path), path, False, _array_rows(path))
    return Source(str(path), path, True, read_lines(path))


def _inner_suffix(path: Path) -> str:
    name = path.name.lower()
    for packed in (".gz", ".zst"):
        name = name.removesuffix(packed)
    return Path(name).suffix


def _chunks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file; DataError when it is unreadable, damaged or cut short."""
    try:
        if path.name.lower().endswith(".zst"):
            yield from _zstd_chunks(path)
            return
        opener = gzip.open if path.name.lower().endswith(".gz") else open
        with opener(path, "rb") as handle:
            while chunk := handle.read(_CHUNK):
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise DataError(f"{path} is damaged or cut short ({problem}); fetch or write it again.") from None
    except OSError as problem:
        raise DataError(f"{path} could not be read ({problem.strerror or problem}).") from None


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    import zstandard

    reader = zstandard.ZstdDecompressor()
    frame = None
    try:
        with open(path, "rb") as handle:
            while chunk := handle.read(_CHUNK):
                while chunk:
                    if frame is None or frame.eof:
                        frame = reader.decompressobj()
                    yield frame.decompress(chunk)
                    chunk = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as problem:
        raise DataError(f"{path} is damaged ({problem}); fetch or write it again.") from None
    if frame is not None and not frame.eof:
        raise DataError(f"{path} is damaged or cut short (its last frame has no end); fetch or write it again.")


def _split_lines(chunks: Iterable[bytes], limit: int) -> Iterator[tuple[int, bytes, bool]]:
    """(line number, bytes without the line end, whether longer than `limit`), holding one line at most."""
    number, rest, huge = 1, b"", False
    for chunk in chunks:
        pieces = chunk.split(b"\n")
        pieces[0] = rest + pieces[0]
        rest = pieces.pop()
        for piece in pieces:
            too_long = huge or len(piece) > limit
            yield number, piece[:_KEEP_OF_HUGE] if too_long else piece.removesuffix(b"\r"), too_long
            number, huge = number + 1, False
        if len(rest) > limit:
            rest, huge = rest[:_KEEP_OF_HUGE], True
    if rest:
        yield number, rest.removesuffix(b"\r"), huge


def read_lines(path: Path, *, max_line: int = MAX_LINE) -> Iterator[Row | BadRow]:
    """The rows of a JSONL file, blank lines left out; a byte order mark at its start and CRLF are fine."""
    for number, line, huge in _split_lines(_chunks(path), max_line):
        if number == 1:
            line = line.removeprefix(_UTF8_BOM)
        if huge:
            shown = line.decode("utf-8", errors="backslashreplace")
            yield BadRow(number, f"the line is longer than {max_line:,} bytes", shown)
        elif line.strip():
            yield _parse_line(number, line)


def _parse_line(number: int, line: bytes) -> Row | BadRow:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as problem:
        what = f"invalid UTF-8 at byte {problem.start + 1} of the line"
        if number == 1 and line.startswith(_UTF16_BOMS):
            what = "the file is UTF-16; save it as UTF-8"
        return BadRow(number, what, line.decode("utf-8", errors="backslashreplace"))
    try:
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=once)
    except json.JSONDecodeError as problem:
        if text.strip() == "[":
            return BadRow(number, "a JSON array; name the file .json, or write one object a line", text)
        return BadRow(number, f"not JSON ({problem.msg}, column {problem.colno})", text)
    except (ValueError, RecursionError) as problem:
        return BadRow(number, f"not JSON ({problem})", text)
    if not isinstance(value, dict):
        return BadRow(number, f"a row must be a JSON object, found {_kind(value)}", text)
    return Row(number, value)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's mapping, for json.loads. Raises ValueError for a key that comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} comes twice in one object")
    return found


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _starts_array(path: Path) -> bool:
    for chunk in _chunks(path):
        head = chunk.removeprefix(_UTF8_BOM).lstrip()
        if head:
            return head.startswith(b"[")
    return False


def _array_rows(path: Path) -> Iterator[Row | BadRow]:
    try:
        values = json.loads(
            b"".join(_chunks(path)).decode("utf-8-sig"), parse_constant=_no_constant, object_pairs_hook=once
        )
    except json.JSONDecodeError as problem:
        raise DataError(f"{path}:{problem.lineno}: not JSON ({problem.msg}, column {problem.colno}).") from None
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{path}: not a JSON array in UTF-8 ({problem}).") from None
    yield from _listed_rows(values)


def _listed_rows(values: Iterable[Any]) -> Iterator[Row | BadRow]:
    for number, value in enumerate(values, start=1):
        if isinstance(value, Mapping):
            yield Row(number, dict(value))
        else:
            yield BadRow(number, f"a row must be an object, found {_kind(value)}", str(value))


def _parquet_rows(path: Path) -> Iterator[Row | BadRow]:
    parquet = importlib.import_module("pyarrow.parquet")
    arrow = importlib.import_module("pyarrow")
    number = 0
    try:
        with parquet.ParquetFile(path) as handle:
            names = handle.schema_arrow.names
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise DataError(f"{path} has two columns named {listed(twice)}; write it with one of each.")
            for batch in handle.iter_batches():
                for value in _plain_rows(batch, path):
                    number += 1
                    yield Row(number, _without_nulls(value))
    except (arrow.ArrowException, OSError) as problem:
        raise DataError(f"{path} is no readable Parquet file ({problem}).") from None


def _plain_rows(batch: Any, path: Path) -> list[dict[str, Any]]:
    """The rows of a batch as Python values. Raises DataError that names a column whose values are none."""
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except (ValueError, OverflowError, LookupError):  # text that is not UTF-8, times out of range, an unknown zone
        for name in batch.schema.names:
            try:
                batch.column(name).to_pylist()
            except (ValueError, OverflowError, LookupError) as problem:
                raise DataError(
                    f"{path}: the column {name!r} holds what cannot be read ({problem}); mend it, or write the file "
                    "without it."
                ) from None
        raise
    return rows


def _hub_rows(name: str, config: str | None, split: str) -> Iterator[Row | BadRow]:
    import datasets

    try:
        table = datasets.load_dataset(name, config, split=split)
    except ConnectionError as problem:
        raise DataError(
            f"The data set {name!r} could not be fetched: no connection to the hub ({problem}). "
            "Connect, or give a local file."
        ) from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as problem:
        raise DataError(f"The data set {name!r} (split {split!r}) could not be loaded: {problem}") from None
    for number, value in enumerate(table, start=1):
        yield Row(number, _without_nulls(value))


def _without_nulls(value: Any) -> Any:
    """Arrow gives every struct every field met in the file; the fields a row does not have come as null."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
