"""Reading rows: kinds of file, line numbers, and one clear error for each kind of damage."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from postil.data.rows import BadRow, Row, _split_lines, open_source, read_lines
from postil.errors import DataError

ROWS = [{"text": "one"}, {"text": "zwei ü"}, {"text": "three"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(path: Path | str | list[Any]) -> list[Row | BadRow]:
    return list(open_source(path).rows)


def good(path: Path) -> list[dict[str, Any]]:
    rows = read(path)
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.value for row in rows if isinstance(row, Row)]


def bad(tmp_path: Path, line: bytes) -> BadRow:
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSONL + line + b"\n" + JSONL)
    rows = read(path)
    assert len(rows) == 7
    found = [row for row in rows if isinstance(row, BadRow)]
    assert len(found) == 1
    assert found[0].number == 4
    return found[0]


@pytest.mark.parametrize(
    ("name", "packed"),
    [
        ("a.jsonl", JSONL),
        ("a.ndjson", JSONL),
        ("a.json", JSONL),
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)),  # the same name in every process
        ("a.JSONL.GZ", gzip.compress(JSONL, mtime=0)),  # the same name in every process
        ("a.jsonl.zst", zstandard.compress(JSONL)),
        ("a.jsonl.zst", zstandard.compress(JSONL[:14]) + zstandard.compress(JSONL[14:])),
        ("a.jsonl", b"\xef\xbb\xbf" + JSONL),
        ("a.jsonl", JSONL.replace(b"\n", b"\r\n")),
        ("a.jsonl", JSONL.rstrip(b"\n")),
        ("a.jsonl", b"\n  \n" + JSONL.replace(b"\n", b"\n\n")),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, packed: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(packed)
    assert good(path) == ROWS


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    rows = [{"m": [{"role": "user"}]}, {"m": [{"role": "tool", "name": "x"}], "extra": "y"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=_schema()), path)
    assert good(path) == rows  # no field of another row comes along as null
    assert open_source(path).where(2) == f"{path}, row 2"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet is no readable Parquet file"):
        read(path)


def test_columns_of_parquet_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    text = pyarrow.array(["p"])
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")]
    )
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text, "note": broken}), path)
    with pytest.raises(DataError, match=r"a\.parquet: the column 'note' holds what cannot be read"):
        read(path)
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([text, text], names=["prompt", "prompt"]), path)
    with pytest.raises(DataError, match="two columns named prompt"):
        read(path)


def _schema() -> Any:
    import pyarrow

    message = pyarrow.struct([("role", pyarrow.string()), ("name", pyarrow.string())])
    return pyarrow.schema([("m", pyarrow.list_(message)), ("extra", pyarrow.string())])


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "x"}\n\n{"text": "y"}')
    assert [row.number for row in read(path)] == [2, 4]
    assert open_source(path).where(4) == f"{path}:4"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"text": }', "not JSON (Expecting value, column 10)"),
        (b'{"text": "a"} x', "not JSON (Extra data, column 15)"),
        (b'{"text": NaN}', "not JSON (NaN is no JSON value)"),
        (b'["a"]', "a row must be a JSON object, found a list"),
        (b"null", "a row must be a JSON object, found null"),
        (b"true", "a row must be a JSON object, found true or false"),
        (b"[", "a JSON array; name the file .json, or write one object a line"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 11 of the line"),
        (b"[" * 200_000, "not JSON (maximum recursion depth exceeded"),
    ],
)
def test_a_bad_line_says_what_is_wrong_and_the_others_are_read(tmp_path: Path, line: bytes, error: str) -> None:
    assert bad(tmp_path, line).error.startswith(error)


def test_utf16_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n', encoding="utf-16")
    first = read(path)[0]
    assert isinstance(first, BadRow)
    assert first.error == "the file is UTF-16; save it as UTF-8"


@pytest.mark.parametrize("length", [100, 101, 5_000, 3_000_000])
def test_a_huge_line_is_refused_and_not_held(tmp_path: Path, length: int) -> None:
    path = tmp_path / "a.jsonl"
    head, tail = b'{"text": "', b'"}'
    huge = head + b"x" * (length - len(head) - len(tail)) + tail
    path.write_bytes(b'{"text": "x"}\n' + huge + b'\n{"text": "z"}\n')
    first, second, third = read_lines(path, max_line=100)
    assert isinstance(first, Row)
    assert isinstance(third, Row)
    assert third.number == 3
    if length == 100:
        assert isinstance(second, Row)
    else:
        assert isinstance(second, BadRow)
        assert second.error == "the line is longer than 100 bytes"
        assert len(second.text) <= 200


@given(
    st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"").replace(b"\r", b""))),
    st.integers(1, 7),
    st.integers(1, 20),
)
def test_lines_do_not_depend_on_chunks(lines: list[bytes], size: int, limit: int) -> None:
    whole = b"\n".join(lines)
    chunks = [whole[start : start + size] for start in range(0, len(whole), size)]
    got = list(_split_lines(chunks, limit))
    wanted = lines if lines and lines[-1] else lines[:-1]
    assert [number for number, _, _ in got] == list(range(1, len(wanted) + 1))
    for (_, line, huge), original in zip(got, wanted, strict=True):
        assert huge == (len(original) > limit)
        assert original.startswith(line) if huge else line == original


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("a.jsonl.gz", lambda: gzip.compress(JSONL)[:-12]),
        ("a.jsonl.gz", lambda: JSONL),
        ("a.jsonl.zst", lambda: zstandard.compress(JSONL * 100)[:-3]),
        ("a.jsonl.zst", lambda: JSONL),
    ],
)
def test_a_damaged_archive_is_named(tmp_path: Path, name: str, damage: Callable[[], bytes]) -> None:
    path = tmp_path / name
    path.write_bytes(damage())
    with pytest.raises(DataError, match=rf"{name} is damaged"):
        read(path)


def test_missing_directory_and_unknown_kinds(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(JSONL)
    with pytest.raises(DataError, match=r"trian\.jsonl does not exist \(did you mean 'train\.jsonl'\?\)"):
        open_source(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"does not exist\.$"):
        open_source("data/train.jsonl")  # has the form of a hub name, and the suffix of a file
    with pytest.raises(DataError, match="is a directory; name one file in it"):
        open_source(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"\.csv is not read; use one of \.jsonl"):
        open_source(tmp_path / "a.csv")


def test_a_broken_array_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "x"},\n {"text": }]')
    with pytest.raises(DataError, match=r"a\.json:2: not JSON"):
        read(path)


def test_a_list_of_rows() -> None:
    rows = read([{"text": "x"}, "y"])
    assert isinstance(rows[0], Row)
    assert rows[1] == BadRow(2, "a row must be an object, found a string", "y")


def test_a_hub_name_is_loaded_and_no_network_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []

    def fake(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        if name == "no/network":
            raise ConnectionError("Couldn't reach the hub")
        if name == "no/split":
            raise ValueError("Unknown split 'tran'")
        return [{"text": "x", "none": None}]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert read("some/set") == [Row(1, {"text": "x"})]
    read("some/set/main:test[:10%]")
    assert asked == [("some/set", None, "train"), ("some/set", "main", "test[:10%]")]
    with pytest.raises(DataError, match="no connection to the hub"):
        read("no/network")
    with pytest.raises(DataError, match="could not be loaded: Unknown split 'tran'"):
        read("no/split:tran")
