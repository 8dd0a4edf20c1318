"""Measures of form: an answer that is JSON, JSON that keeps to a schema, an answer that matches a pattern."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.validators import validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from postil.errors import JudgeError
from postil.judging.metrics.metric import Metric, Row
from postil.judging.metrics.options import Given, NoOptions, RegexOptions, SchemaOptions, chosen
from postil.judging.metrics.wanted import column_of, share

_NOT_JSON = object()


def is_json(given: Given) -> Metric:
    """The percentage of answers that are one JSON value and nothing else."""
    chosen(NoOptions, given)
    return share("json", lambda answer, _: read_json(answer) is not _NOT_JSON)


def json_schema(given: Given) -> Metric:
    """The percentage of answers that are JSON and keep to the schema, the option's or the row's own."""
    options = chosen(SchemaOptions, given)
    fixed = None if options.json_schema is None else json.dumps(options.json_schema)
    if fixed is not None:
        checked(fixed)

    def right(answer: str, row: Row) -> bool:
        schema = fixed or checked(schema_text(column_of(row, options.column)))  # also where no answer is JSON
        value = read_json(answer)
        return value is not _NOT_JSON and fits(schema, value)

    return share("json_schema", right)


def regex(given: Given) -> Metric:
    """The percentage of stripped answers that match the pattern as a whole, the option's or the row's own."""
    options = chosen(RegexOptions, given)
    fixed = None if options.pattern is None else _compiled(options.pattern)

    def right(answer: str, row: Row) -> bool:
        return (fixed or _compiled(column_of(row, options.column))).fullmatch(answer.strip()) is not None

    return share("regex", right)


def read_json(text: str) -> Any:
    """The value of a JSON text, or a mark that is no value; NaN and Infinity are not JSON (RFC 8259)."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _NOT_JSON


def _refuse(constant: str) -> Any:
    raise ValueError(constant)


def schema_text(schema: Any) -> str:
    """A schema, given as an object or as its JSON text, as JSON text."""
    if isinstance(schema, Mapping):
        return json.dumps(schema)
    if not isinstance(schema, str) or not isinstance(read_json(schema), dict):
        raise JudgeError(f"a JSON schema must be an object, found {schema!r:.80}")
    return schema


def fits(schema: str, value: Any) -> bool:
    """Whether a value keeps to a JSON schema (given as text). Raises JudgeError for a schema that is none."""
    try:
        return bool(_validator(schema).is_valid(value))
    except Unresolvable as problem:
        raise JudgeError(f"the JSON schema refers to what it does not hold ({problem})") from None
    except RecursionError:
        raise JudgeError("the JSON schema refers to itself without end, or the answer is nested too deeply") from None


def checked(schema: str) -> str:
    """The schema (as text), its form looked at. Raises JudgeError for one that is none."""
    _validator(schema)
    return schema


@functools.lru_cache(maxsize=4096)
def _validator(schema: str) -> Any:
    """The validator of the draft that the schema names, 2020-12 by default; it fetches nothing from anywhere."""
    value = json.loads(schema)
    if not isinstance(value.get("$schema", ""), str):
        raise JudgeError(f"the JSON schema is none: its $schema must be a string, found {value['$schema']!r:.80}")
    kind = validator_for(value, default=Draft202012Validator)
    try:
        kind.check_schema(value)
    except SchemaError as problem:
        raise JudgeError(f"the JSON schema is none: {problem.message} (at {problem.json_path})") from None
    return kind(value, registry=Registry())


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: Any) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise JudgeError(f"a pattern must be a string, found {pattern!r:.80}")
    try:
        return re.compile(pattern)
    except re.error as problem:
        raise JudgeError(f"the pattern {pattern!r:.80} is no regular expression ({problem})") from None
