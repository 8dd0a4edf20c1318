"""load_data as a whole: bad lines stop or go aside, the report, limits, hashes, speed of thought."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from postil.data import DataOptions, load_data, template_hash
from postil.errors import DataError, StorageError

GOOD = '{"prompt": "The quick", "completion": "brown fox"}\n'
BAD = ["{", '{"prompt": "p", "completion": ""}', '{"prompt": "p"}', "[]", '{"text": "t"}', "x", "y"]


@dataclass
class FakeBase:
    tokenizer: Any
    context: int | None


@pytest.fixture
def spoiled(tmp_path: Path) -> Path:
    """Good and bad lines in turn: the bad ones are 2, 4, 6, ..."""
    path = tmp_path / "train.jsonl"
    path.write_text("".join(GOOD + line + "\n" for line in BAD), encoding="utf-8")
    return path


def test_stops_naming_five_bad_lines_and_their_number(chatml: Any, spoiled: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_data(spoiled, chatml)
    message = str(caught.value)
    assert f"{spoiled} has 7 bad lines." in message
    assert f"{spoiled}:2: not JSON" in message
    assert f"{spoiled}:4: 'completion' is empty" in message
    assert f"{spoiled}:10: no column 'prompt'" in message
    assert ":12:" not in message
    assert "and 2 more. Mend this, or leave such lines out with --skip-bad-lines" in message
    assert list(spoiled.parent.iterdir()) == [spoiled]


def test_one_bad_line_is_one_sentence(chatml: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 6 + BAD[1], encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_data(path, chatml)
    assert str(caught.value).startswith(f"{path}:7: 'completion' is empty. Mend this")


def test_bad_lines_go_aside(chatml: Any, spoiled: Path, tmp_path: Path) -> None:
    dataset = load_data(spoiled, chatml, DataOptions(skip_bad_lines=True), side_directory=tmp_path / "run")
    assert [sample.row for sample in dataset.samples] == [1, 3, 5, 7, 9, 11, 13]
    assert dataset.report.bad_rows == (2, 4, 6, 8, 10, 12, 14)
    aside = tmp_path / "run" / "train.jsonl.bad.jsonl"
    assert dataset.report.bad_file == str(aside)
    lines = [json.loads(line) for line in aside.read_text(encoding="utf-8").splitlines()]
    assert [set(line) for line in lines] == [{"file", "line", "error", "text"}] * 7
    assert lines[1] == {
        "file": str(spoiled),
        "line": 4,
        "error": "'completion' is empty",
        "text": BAD[1],
    }
    assert [line["text"] for line in lines] == BAD
    assert any("7 rows bad, left out (see " in line for line in dataset.report.lines())


def test_bad_lines_go_beside_the_file_by_default(chatml: Any, spoiled: Path) -> None:
    load_data(spoiled, chatml, DataOptions(skip_bad_lines=True))
    assert (spoiled.parent / "train.jsonl.bad.jsonl").exists()


def test_no_side_file_without_bad_lines(chatml: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD, encoding="utf-8")
    report = load_data(path, chatml, DataOptions(skip_bad_lines=True)).report
    assert report.bad_file is None
    assert list(tmp_path.iterdir()) == [path]


def test_the_side_file_takes_what_utf8_cannot(chatml: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD.encode() + b'{"prompt": "\xff"}\n{"prompt": "p", "completion": "\\ud800"}\n')
    report = load_data(path, chatml, DataOptions(skip_bad_lines=True)).report
    lines = (tmp_path / "a.jsonl.bad.jsonl").read_text(encoding="utf-8").splitlines()
    assert report.bad_rows == (2, 3)
    assert json.loads(lines[0])["text"] == '{"prompt": "\\xff"}'
    assert json.loads(json.loads(lines[1])["text"])["completion"] == "\ud800"


def test_only_bad_lines_is_an_error_even_when_skipping(chatml: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(BAD[:2]), encoding="utf-8")
    with pytest.raises(DataError, match=r"has 2 bad lines.*No usable line is left\."):
        load_data(path, chatml, DataOptions(skip_bad_lines=True))


def test_a_fault_of_all_lines_is_said_once(chatml: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 7, encoding="utf-8")
    with pytest.raises(DataError) as raised:
        load_data(path, chatml, DataOptions(columns={"prompt": "foo"}))
    assert str(raised.value).count("no column 'foo'") == 1
    assert "all 7 lines are alike in it" in str(raised.value)


def test_a_disk_that_refuses_leaves_nothing(chatml: Any, spoiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("postil.files._fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        load_data(spoiled, chatml, DataOptions(skip_bad_lines=True))
    assert list(spoiled.parent.iterdir()) == [spoiled]


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_an_empty_file(chatml: Any, tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl is empty: it has no row"):
        load_data(path, chatml)
    with pytest.raises(DataError, match="the given rows is empty"):
        load_data([], chatml)


def test_the_report(chatml: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "answer": "a", "id": 1}\n' * 2, encoding="utf-8")
    options = DataOptions(columns={"prompt": "question", "completion": "answer"})
    dataset = load_data(path, chatml, options, context=100)
    report = dataset.report
    assert (report.rows, report.samples, report.format) == (2, 2, "prompt")
    assert report.shape == "prompt and completion"
    assert report.columns == ("question", "answer")
    assert report.ignored_columns == ("id",)
    assert report.template_hash == template_hash(chatml)
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.tokens == sum(len(sample.ids) for sample in dataset.samples)
    assert report.target_tokens == 2 * 2  # "a" and <|im_end|>
    assert report.longest == len(dataset.samples[0].ids)
    assert report.max_length == 100
    assert report.notes == ()
    assert report.lines()[0] == f"data: {path}, 2 rows read as prompt and completion (question, answer)"
    assert "columns not read: id" in report.lines()


def test_a_null_in_a_mapped_column_of_parquet(chatml: Any, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"q": "1", "a": "x", "ctx": "c"}, {"q": "2", "a": "y", "ctx": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    columns = {"instruction": "q", "output": "a", "input": "ctx"}
    assert load_data(tmp_path / "a.parquet", chatml, DataOptions(columns=columns)).report.samples == 2
    with pytest.raises(
        DataError, match=r"columns: no row has anything in 'ctxt' .*'ctx'.*, which stands for 'input'"
    ):
        load_data(tmp_path / "a.parquet", chatml, DataOptions(columns=columns | {"input": "ctxt"}))


def test_rows_from_a_list_have_a_hash_of_their_own(chatml: Any) -> None:
    rows = [{"text": "a"}, {"text": "b"}]
    first = load_data(rows, chatml).report.sha256
    assert first == load_data([{**row} for row in rows], chatml).report.sha256
    assert first != load_data(rows[::-1], chatml).report.sha256


def test_a_base_gives_tokenizer_and_context(chatml: Any) -> None:
    rows = [{"text": "The fox"}, {"text": "The fox " * 30}]
    assert load_data(rows, FakeBase(chatml, 20)).report.too_long_rows == (2,)
    assert load_data(rows, FakeBase(chatml, None)).report.too_long_rows == ()
    assert load_data(rows, FakeBase(chatml, 2000), context=20).report.too_long_rows == (2,)
    with pytest.raises(DataError, match="max_length 21 is more than the 20 tokens the base can take"):
        load_data(rows, FakeBase(chatml, 20), DataOptions(max_length=21))
    with pytest.raises(DataError, match="the base has no tokenizer"):
        load_data(rows, FakeBase(None, 20))


def test_messages_need_a_template(make_tokenizer: Any) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(DataError, match="the base has no chat template"):
        load_data([row], make_tokenizer(None))


def test_a_bad_first_line_does_not_choose_the_format(chatml: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"txet": "x"}\n' + GOOD, encoding="utf-8")
    report = load_data(path, chatml, DataOptions(skip_bad_lines=True)).report
    assert (report.bad_rows, report.samples) == ((1,), 1)


def test_importing_the_data_folder_loads_no_torch() -> None:
    code = "import sys, postil.data; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
