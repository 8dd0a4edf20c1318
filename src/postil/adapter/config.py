"""LoraConfig: which layers get a note, how large, how strong; and the scale s = alpha/r that follows."""

from __future__ import annotations

import math
import re
from typing import ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator

from postil.errors import AdapterError, PostilError
from postil.settings import Settings

ATTENTION = "attention"
FEED_FORWARD = "feed-forward"
ALL_LINEAR = "all-linear"


class LoraConfig(Settings):
    """The mathematics of one adapter: W_eff = W + s·B·A, s = alpha/r (PEFT's convention, not "W + alpha·B·A").

    target_modules: None or "attention" (the attention projections, found per architecture), "feed-forward",
    "all-linear" (every linear map but the output head), a list of these words and of module names (equal to
    a module's path or its dotted suffix), or a regular expression that matches whole paths.
    rank_pattern, alpha_pattern: {regular expression of a path's end: value}, the first match wins.
    Raises AdapterError for an unknown key or an impossible value.
    """

    model_config = ConfigDict(allow_inf_nan=False)
    error: ClassVar[type[PostilError]] = AdapterError
    where: ClassVar[str] = "LoraConfig"

    r: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    use_rslora: bool = False
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: tuple[str, ...] | None = None
    init: Literal["kaiming", "gaussian"] = "kaiming"

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _names(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        if isinstance(value, str) and not value:
            raise ValueError("an empty string names no module")
        if isinstance(value, tuple) and not value:
            raise ValueError("an empty list names no module; leave the key out for the default")
        if isinstance(value, str) and value not in (ATTENTION, FEED_FORWARD, ALL_LINEAR):
            _compiled(value)
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _patterns(cls, value: dict[str, float]) -> dict[str, float]:
        for pattern, number in value.items():
            _compiled(pattern)
            if number <= 0:
                raise ValueError(f"the value of pattern {pattern!r} must be above 0")
        return value

    @field_validator("layers_pattern")
    @classmethod
    def _with_layers(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        return value or None

    def rank_of(self, path: str) -> int:
        """The rank at the module `path`."""
        return int(_first(self.rank_pattern, path, self.r))

    def alpha_of(self, path: str) -> float:
        """The alpha at the module `path`."""
        return float(_first(self.alpha_pattern, path, self.alpha))

    def scale_of(self, path: str) -> float:
        """s = alpha/r; with rsLoRA alpha/sqrt(r) (Kalajdzievski 2023, section 4)."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.use_rslora else rank)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as problem:
        raise ValueError(f"{pattern!r} is no regular expression ({problem})") from None


def pattern_matches(pattern: str, path: str) -> bool:
    """PEFT's rule for rank_pattern and alpha_pattern: the pattern matches the end of the dotted path."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _first(patterns: dict[str, float] | dict[str, int], path: str, default: float) -> float:
    for pattern, value in patterns.items():
        if pattern_matches(pattern, path):
            return value
    return default
