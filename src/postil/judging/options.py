"""How an adapter is judged: the settings behind `postil judge`, each with its default."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from postil.data import DataOptions
from postil.errors import JudgeError, PostilError
from postil.settings import Settings

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # of the λ curve


class GeneralOptions(Settings):
    """What is measured of general ability.

    tokens: of running text, from its beginning (null: all); window: tokens that see each other. kl: also how far
    the next-token distributions lie from the base's. prompt: what leads to a choice, `{context}` in it; where a
    row's column `cloze` is true (or each context of a file holds one lone `_`) the choice fills that blank instead,
    and the rest of the sentence is scored.
    choices, pairs: at most this many, by chance from the seed; pairs_each: of every `paradigm` at most this many.
    chat_tokens: of the base's own answers to the chat prompts.
    """

    where: ClassVar[str] = "general"
    error: ClassVar[type[PostilError]] = JudgeError

    tokens: int | None = Field(default=32_768, ge=2)
    window: int = Field(default=512, ge=8)
    kl: bool = True
    prompt: str = "Question: {context}\nAnswer:"
    choices: int | None = Field(default=None, ge=1)
    pairs: int | None = Field(default=None, ge=1)
    pairs_each: int | None = Field(default=None, ge=1)
    chat_tokens: int = Field(default=48, ge=1)

    @field_validator("prompt")
    @classmethod
    def _has_context(cls, value: str) -> str:
        if value.count("{context}") != 1:
            raise ValueError("must hold {context} once, for example 'Question: {context}\\nAnswer:'")
        return value


class LeakageOptions(Settings):
    """Which training rows are tried: `rows` of them by chance; given its prompt and the first `prefix_tokens` of
    what it taught, a row leaks where the greedy answer repeats at least `matched_tokens` of the rest in one run."""

    where: ClassVar[str] = "leakage"
    error: ClassVar[type[PostilError]] = JudgeError

    rows: int = Field(default=200, ge=1)
    prefix_tokens: int = Field(default=8, ge=0)
    matched_tokens: int = Field(default=16, ge=1)
    new_tokens: int = Field(default=64, ge=1)


class HarnessOptions(Settings):
    """Tasks of lm-eval (the `lm-eval` extra), each a general part of the card by its name.

    tasks: names of tasks and groups, or a task's YAML file. shots: examples before a question (null: as the task
    says, else 0). limit: at most this many documents of each, from the first. chat: prompts as conversations.
    """

    where: ClassVar[str] = "lm_eval"
    error: ClassVar[type[PostilError]] = JudgeError

    tasks: tuple[str, ...] = ()
    shots: int | None = Field(default=None, ge=0)
    limit: int | None = Field(default=None, ge=1)
    chat: bool = False


class JudgeOptions(Settings):
    """Settings of `judge`; raises JudgeError naming the key for anything unknown or impossible.

    metrics: names, the first decides; none takes the one that fits the rows. metric_options: by name, what a
        metric is told.
    rows: how the target's rows are read; null takes what the adapter's recipe says.
    limit: at most this many prompts, by chance from the seed. max_new_tokens: null is a quarter more than the
        longest reference and 8. stop: null is a newline for raw rows (a blank line where an answer has newlines).
    slices: columns whose values are looked at apart, from `smallest_slice` rows on; rarer ones are one
        slice together.
    shots: examples in the base's few-shot prompt; null is 4 where the training rows are known (given, or as the
        adapter's recipe names them), 0 asks without.
    scope: what the adapter is for: anything that its base answers (assistant), or its own task alone (task), which
        is then on its card and of which no damage to chat is refused.
    null: random adapters of equal norm (0, or 2 and more); curve: scales of the adapter's term to measure.
        null_answers, curve_answers: generate answers there too, not only likelihoods (slow).
    batch: rows that decode together. fresh: ask base and adapter anew, though what they said to an earlier judging of
        the same questions is kept in the user's cache. level: of the intervals.
    """

    where: ClassVar[str] = "judge"
    error: ClassVar[type[PostilError]] = JudgeError

    metrics: tuple[str, ...] = ()
    metric_options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    rows: DataOptions | None = None
    limit: int | None = Field(default=None, ge=1)
    max_new_tokens: int | None = Field(default=None, ge=1)
    stop: tuple[str, ...] | None = None
    slices: tuple[str, ...] = ()
    smallest_slice: int = Field(default=10, ge=2)
    shots: int | None = Field(default=None, ge=0)
    scope: Literal["assistant", "task"] = "assistant"
    null: int = Field(default=0, ge=0)
    null_answers: bool = False
    curve: tuple[float, ...] = ()
    curve_answers: bool = False
    general: GeneralOptions = Field(default_factory=GeneralOptions)
    leakage: LeakageOptions = Field(default_factory=LeakageOptions)
    lm_eval: HarnessOptions = Field(default_factory=HarnessOptions)
    batch: int = Field(default=32, ge=1)
    fresh: bool = False
    seed: int = Field(default=0, ge=0)
    resamples: int = Field(default=1000, ge=100)
    level: float = Field(default=0.95, gt=0.5, lt=1)

    @field_validator("null")
    @classmethod
    def _a_spread(cls, value: int) -> int:
        if value == 1:
            raise ValueError("one random adapter has no spread to compare with; give 2 or more (8 is good)")
        return value

    @field_validator("curve")
    @classmethod
    def _scales(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 <= scale <= 4 for scale in value):
            raise ValueError("scales lie from 0 (the base) to 4")
        return tuple(sorted(set(value)))

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None and "" in value:
            raise ValueError("an empty string would stop every answer")
        return value
