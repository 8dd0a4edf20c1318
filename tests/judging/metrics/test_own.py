"""A user's own function as a measure: what it gets and gives, and errors that name its line and the row."""

from __future__ import annotations

from pathlib import Path

import pytest

from postil.errors import JudgeError
from postil.judging.metrics import metric_named

GOOD = """
from dataclasses import dataclass

@dataclass
class Weight:
    of: float = 2.0

def length(answer, row):
    row["seen"] = True
    return None if row.get("skip") else len(answer) * Weight().of

def errors(answer: str, row: dict) -> bool:
    return answer != row["completion"]

same = lambda answer, row: 1
limit = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my score.py"
    path.write_text(GOOD)
    return path


def test_the_mean_of_what_the_function_gives(file: Path) -> None:
    metric = metric_named(f"{file}:length")
    row = {"completion": "x"}
    stats = metric.statistics(["abc", "a", "-"], [row, row, {"skip": True}])
    assert stats.tolist() == [[6, 1], [2, 1], [0, 0]]
    assert metric.value(stats.sum(axis=0)) == 4
    assert (metric.name, metric.better, metric.unit) == ("own.length", "higher", "points")
    assert row == {"completion": "x"}  # the function had a copy
    assert metric_named(f"{file}:same").name == "own.same"
    assert [one.name for one in file.parent.iterdir()] == [file.name]  # nothing was written beside the file


def test_which_way_is_better_is_an_option(file: Path) -> None:
    metric = metric_named(f"{file}:errors", {"better": "lower", "unit": "slips"})
    assert (metric.better, metric.sign, metric.unit) == ("lower", -1, "slips")
    assert metric.statistics(["x", "y"], [{"completion": "x"}] * 2)[:, 0].tolist() == [0, 1]
    with pytest.raises(JudgeError, match="better"):
        metric_named(f"{file}:errors", {"better": "smaller"})


def test_a_failing_function_names_its_line_and_the_row(file: Path) -> None:
    with pytest.raises(JudgeError, match=r"row 2: .*my score\.py:errors failed: KeyError: 'completion' \(line 13\)"):
        metric_named(f"{file}:errors").statistics(["x", "y"], [{"completion": "x"}, {}])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("class Bad(Exception): pass\n    raise Bad('no')", r"Bad: no \(line 3\)"),
        (
            "import jsonschema\n    jsonschema.validate(1, {'type': 'string'})",
            r"ValidationError: 1 is not .* \(line 3\)",
        ),
        ("raise StopIteration", r"StopIteration \(line 2\)"),
        (
            "class Mute(Exception):\n        def __str__(self): raise ValueError\n    raise Mute",
            r"Mute: .* \(line 4\)",
        ),
        ("raise SystemExit(3)", r"SystemExit: 3 \(line 2\)"),
        ("raise ExceptionGroup('many', [ValueError('one')])", r"ExceptionGroup: many .*\(line 2\)"),
        (
            "return type('N', (), {'__float__': lambda self: 1 / 0})()",
            r"ZeroDivisionError: division by zero \(line 2\)",
        ),
    ],
)
def test_whatever_a_users_code_raises_is_one_sentence(tmp_path: Path, body: str, said: str) -> None:
    path = tmp_path / "score.py"
    path.write_text(f"def score(answer, row):\n    {body}\n")
    with pytest.raises(JudgeError, match=rf"row 1: .*score\.py:score failed: .*{said}$") as problem:
        metric_named(f"{path}:score").statistics(["x"], [{}])
    assert "\n" not in str(problem.value)
    path.write_text("class Odd(Exception): pass\nraise Odd('top')\n")
    with pytest.raises(JudgeError, match=r"score\.py could not be run: .*Odd: top \(line 2\)$"):
        metric_named(f"{path}:score")


def test_a_row_counts_for_every_answer_or_for_none(tmp_path: Path) -> None:
    path = tmp_path / "score.py"
    path.write_text("def score(answer, row):\n    return float(answer) if answer.isdigit() else None\n")
    rows = [{"prompt": "p", "completion": "1"}, {"prompt": "q", "completion": "2"}]
    metric = metric_named(f"{path}:score")
    assert metric.statistics(["1", "x"], rows).tolist() == [[1, 1], [0, 0]]
    with pytest.raises(JudgeError, match=r"row 2: .*gives None for one answer to this row and a number for another"):
        metric.statistics(["1", "2"], rows)
    with pytest.raises(JudgeError, match="gives None for one answer"):  # found on one row, before the work
        metric_named(f"{path}:score").look(rows)


def test_a_function_is_tried_on_the_first_row_with_a_wanted_and_an_empty_answer(tmp_path: Path) -> None:
    path = tmp_path / "score.py"
    path.write_text(
        "seen = []\ndef score(answer, row):\n    seen.append((answer, row['prompt']))\n    return len(seen)\n"
    )
    metric = metric_named(f"{path}:score")
    assert metric.look([{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "d"}]) == []
    assert metric.statistics(["x"], [{"prompt": "p"}]).tolist() == [[3, 1]]


@pytest.mark.parametrize("gives", ["float('nan')", "float('inf')", "'0.5'", "10 ** 400", "[1]"])
def test_what_is_no_finite_number_is_refused(tmp_path: Path, gives: str) -> None:
    path = tmp_path / "score.py"
    path.write_text(f"def score(answer, row):\n    return {gives}\n")
    with pytest.raises(JudgeError, match=r"row 1: .*score\.py:score"):
        metric_named(f"{path}:score").statistics(["x"], [{}])


def test_files_that_cannot_be_run(tmp_path: Path, file: Path) -> None:
    with pytest.raises(JudgeError, match=r"has no function 'lenght' \(did you mean 'length'\?\)"):
        metric_named(f"{file}:lenght")
    with pytest.raises(JudgeError, match="has no function 'limit'"):
        metric_named(f"{file}:limit")
    with pytest.raises(JudgeError, match=r"none\.py could not be read \(No such file"):
        metric_named(f"{tmp_path / 'none.py'}:f")
    for text, wrong in {
        "x = 1\ndef f(:\n": r"SyntaxError: .* \(line 2\)",
        "\nimport no_such_module_here\n": r"ModuleNotFoundError: .* \(line 2\)",
        "1 / 0\n": r"ZeroDivisionError: division by zero \(line 1\)",
        "\0": "could not be run: .*null bytes",
    }.items():
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(
            JudgeError, match=rf"bad\.py could not be run: {wrong.removeprefix('could not be run: ')}"
        ):
            metric_named(f"{tmp_path / 'bad.py'}:f")
