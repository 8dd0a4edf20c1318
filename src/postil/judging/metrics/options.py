"""The options of each measure, checked where a recipe or a flag gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field

from postil.errors import JudgeError, PostilError
from postil.settings import Settings

Given = Mapping[str, Any]
Chosen = TypeVar("Chosen", bound="NoOptions")


class NoOptions(Settings):
    """A measure without options."""

    where: ClassVar[str] = "options of the metric"
    error: ClassVar[type[PostilError]] = JudgeError


class AnswerOptions(NoOptions):
    """first_line: compare only the answer's first line (bases that were not trained go on after the answer)."""

    first_line: bool = False


class LabelOptions(AnswerOptions):
    """labels: every label there is. others: without them, whether an answer that no row wants is a label of its own
    ("labels") or only a miss of the wanted one ("miss")."""

    labels: tuple[str, ...] = ()
    others: Literal["labels", "miss"] = "labels"


class BleuOptions(NoOptions):
    """As sacrebleu's; only tokenizers that need no download."""

    lowercase: bool = False
    tokenize: Literal["13a", "intl", "char", "zh", "none"] = "13a"
    smooth: Literal["exp", "floor", "add-k", "none"] = "exp"


class ChrfOptions(NoOptions):
    """As sacrebleu's; word_order 2 is chrF++."""

    lowercase: bool = False
    char_order: int = Field(default=6, ge=1)
    word_order: int = Field(default=0, ge=0)
    beta: int = Field(default=2, ge=1)


class SariOptions(NoOptions):
    """source: the column with the text to be simplified; otherwise the `input` beside an `instruction`, else the
    whole prompt or last user message, an instruction in it included."""

    source: str | None = None


class NumberOptions(NoOptions):
    """tolerance: how far from the wanted number still counts. column: where the number stands, else the answer.
    decimal: the mark before a number's decimals."""

    tolerance: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    column: str = "answer"
    decimal: Literal[".", ","] = "."


class SchemaOptions(NoOptions):
    """json_schema: the schema of every answer; otherwise each row's, in `column`."""

    json_schema: dict[str, Any] | None = None
    column: str = "schema"


class RegexOptions(NoOptions):
    """pattern: a regular expression that the whole stripped answer must match; otherwise each row's, in `column`."""

    pattern: str | None = None
    column: str = "pattern"


class OwnOptions(NoOptions):
    """Which way a user's own score is better, and what it counts."""

    better: Literal["higher", "lower"] = "higher"
    unit: str = "points"


def chosen(kind: type[Chosen], given: Given) -> Chosen:
    """The options of `kind` from what was given. Raises JudgeError naming the key, with the nearest known one."""
    options: Chosen = kind.parse(dict(given))
    return options
