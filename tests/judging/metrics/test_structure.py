"""Measures of form: JSON and nothing else, the schema of the option or the row, a pattern that matches the whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from postil.errors import JudgeError
from postil.judging.metrics import metric_named

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}


def score(
    name: str, answers: list[str], rows: list[dict[str, object]] | None = None, **options: object
) -> list[float]:
    metric = metric_named(name, options)
    found = metric.statistics(answers, rows or [{} for _ in answers])
    assert (metric.name, metric.unit) == (name, "%")
    assert (found[:, 1] == 1).all()
    return [float(one) for one in found[:, 0]]


def test_json_is_one_value_and_nothing_else() -> None:
    answers = [' {"a": [1, null]}\n', "3", '{"a": 1} so', "{'a': 1}", "NaN", "", "[" * 100_000]
    assert score("json", answers) == [100, 100, 0, 0, 0, 0, 0]


def test_a_schema_for_all_rows() -> None:
    answers = ['{"age": 3}', '{"age": -3}', '{"age": true}', "{}", "not JSON"]
    assert score("json_schema", answers, json_schema=SCHEMA) == [100, 0, 0, 0, 0]


def test_each_rows_own_schema_as_object_or_text() -> None:
    rows = [{"schema": SCHEMA}, {"schema": '{"type": "array"}'}, {"schema": {"type": "array"}}]
    assert score("json_schema", ['{"age": 1}', "[]", "{}"], rows) == [100, 100, 0]
    assert score("json_schema", ["[]"], [{"form": {"type": "array"}}], column="form") == [100]


def test_the_draft_that_a_schema_names_is_used() -> None:
    items = {"items": [{"type": "integer"}]}  # a list of schemas: draft 7's way
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", **items}
    assert score("json_schema", ["[1]", '["x"]'], json_schema=schema) == [100, 0]
    with pytest.raises(JudgeError, match="the JSON schema is none"):
        metric_named("json_schema", {"json_schema": items})


def test_schemas_that_cannot_be_used() -> None:
    for schema, wrong in (
        ({"type": "integr"}, r"row 1: the JSON schema is none: 'integr' .*\$\.type"),
        ({"$ref": "https://example.org/other.json"}, "row 1: the JSON schema refers to what it does not hold"),
        ("[]", r"row 1: a JSON schema must be an object, found '\[\]'"),
        (None, "row 1: no column 'schema'"),
        ({"$schema": ["x"]}, r"row 1: the JSON schema is none: its \$schema must be a string, found \['x'\]"),
        ({"$ref": "#"}, "row 1: the JSON schema refers to itself without end"),
        ({"properties": {"a": {"pattern": r"^\p{L}+$"}}}, "row 1: the JSON schema is none: .* is not a 'regex'"),
        ({"patternProperties": {"(?<n>a)": {}}}, "row 1: the JSON schema is none: .* is not a 'regex'"),
    ):
        with pytest.raises(JudgeError, match=wrong):
            score("json_schema", ["{}"], [{"schema": schema}])
        if not (isinstance(schema, dict) and "$ref" in schema):  # seen before a single answer is there
            with pytest.raises(JudgeError, match=wrong):
                score("json_schema", [""], [{"schema": schema}])
    with pytest.raises(JudgeError, match="integr"):
        metric_named("json_schema", {"json_schema": {"type": "integr"}})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what fetching would come with
def test_nothing_that_a_schema_refers_to_is_fetched(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"type": "object"}')
    with pytest.raises(JudgeError, match=r"refers to what it does not hold \(Unresolvable: file:"):
        score("json_schema", ["{}"], json_schema={"$ref": other.as_uri()})


def test_a_pattern_matches_the_whole_stripped_answer() -> None:
    assert score("regex", [" 2024-05-06\n", "on 2024-05-06", ""], pattern=r"\d{4}-\d\d-\d\d") == [100, 0, 0]
    rows = [{"pattern": "a+"}, {"pattern": "b"}]
    assert score("regex", ["aaa", "a"], rows) == [100, 0]
    assert score("regex", ["x\ny"], [{"form": "x(?s:.)y"}], column="form") == [100]


def test_patterns_that_cannot_be_used() -> None:
    with pytest.raises(JudgeError, match=r"'\(' is no regular expression"):
        metric_named("regex", {"pattern": "("})
    with pytest.raises(JudgeError, match="row 1: no column 'pattern'"):
        score("regex", ["x"])
    with pytest.raises(JudgeError, match="row 1: a pattern must be a string, found 3"):
        score("regex", ["x"], [{"pattern": 3}])
