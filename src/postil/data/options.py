"""How rows become samples: the settings that a recipe's `rows` hold."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator

from postil.errors import DataError, PostilError, listed, nearest
from postil.settings import Settings

COLUMNS = (
    "messages",
    "tools",
    "system",
    "prompt",
    "completion",
    "text",
    "conversations",
    "instruction",
    "input",
    "output",
)
"""The column names postil reads; `DataOptions.columns` maps a file's own names to them."""


class DataOptions(Settings):
    """Settings of `load_data`; raises DataError naming the key for anything unknown or impossible.

    format: "auto" finds chat, prompt/completion, text, Alpaca or ShareGPT columns; "chat", "prompt" (a user
        and an assistant turn), "raw" (prompt + separator + completion + end of sequence) and "text" insist.
    separator: put between prompt and completion by "raw".
    learn: which assistant turns have loss: "all", the "last", or by each message's `weight` (default 1).
    max_length: tokens a sample may have; None is the base's context.
    too_long: what becomes of a longer sample; "truncate" cuts its end, "split" (text only) makes several.
    skip_bad_lines: leave bad lines out and write them to a side file, instead of stopping.
    columns: {postil's column name: the file's column name}.
    """

    model_config = ConfigDict(strict=True)
    error: ClassVar[type[PostilError]] = DataError
    where: ClassVar[str] = "rows"

    format: Literal["auto", "chat", "prompt", "raw", "text"] = "auto"
    separator: str = "\n"
    learn: Literal["all", "last", "weight"] = "all"
    max_length: int | None = Field(default=None, ge=2)
    too_long: Literal["drop", "truncate", "split", "error"] = "drop"
    skip_bad_lines: bool = False
    columns: dict[str, str] = Field(default_factory=dict)

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in COLUMNS:
                raise ValueError(f"unknown column {name!r}{nearest(name, COLUMNS)}; known: {listed(COLUMNS, 12)}")
        return columns
