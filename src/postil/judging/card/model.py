"""The score card: what was measured of an adapter, on what, beside what; as it stands in postil.json."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from postil.errors import JudgeError, PostilError
from postil.settings import Settings

Verdict = Literal["better", "no evidence", "worse"]
Better = Literal["higher", "lower"]
FEW_SHOT = "few_shot"  # the baseline that is the base with examples before each question
_ROUNDING = 1e-6  # of the values at hand: what a sum of many rows loses


class Estimate(Settings):
    """A value with its two-sided interval."""

    where: ClassVar[str] = "score card"
    error: ClassVar[type[PostilError]] = JudgeError

    value: float
    low: float
    high: float

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        ends = (self.value, self.low, self.high)
        slack = _ROUNDING * max(1.0, *map(abs, ends))
        if all(map(math.isfinite, ends)) and not self.low - slack <= self.value <= self.high + slack:
            raise ValueError(f"{self.value:.6g} lies outside its own interval [{self.low:.6g}, {self.high:.6g}]")
        return self


def verdict_of(better: Better, difference: Estimate, corrected: Estimate | None = None) -> Verdict:
    """What the intervals of a difference (adapter minus base) say: harm by the plain one, a gain by the one
    corrected for all looks, where there is one."""
    if _side(better, difference) == "worse":
        return "worse"
    return "better" if _side(better, corrected or difference) == "better" else "no evidence"


def _side(better: Better, found: Estimate) -> Verdict:
    if math.isnan(found.low) or math.isnan(found.high) or found.low <= 0 <= found.high:
        return "no evidence"
    return "better" if (found.low > 0) == (better == "higher") else "worse"


def rows_needed(level: float) -> int:
    """The fewest rows, all changed the same way, that a two-sided sign test finds telling: 2 · 0.5^m ≤ 1 - level."""
    return math.ceil(math.log2(2 / (1 - level)) - 1e-9)


class Comparison(Settings):
    """One measure of base and adapter on the same rows.

    difference: adapter minus base, with its paired bootstrap interval at `level`. corrected: the same at a level
    raised for all the looks that are taken at one set (Bonferroni); a gain must show there, harm in `difference`
    already. verdict: what these intervals say. detectable: the smallest difference that this many rows would have
    shown with 80% power. z: the difference in units of the null adapters' spread, where they were run. definition: a
    digest of all that defines the measure (its options, an own file's bytes, how answers are asked for, the base's
    form); only measures of one definition may be compared with each other. row_values: the adapter's value row by
    row, packed (see row_values.py), so that a later version is compared with this one row by row.
    """

    where: ClassVar[str] = "score card"
    error: ClassVar[type[PostilError]] = JudgeError

    metric: str
    better: Better
    unit: str
    rows: int
    base: Estimate
    adapter: Estimate
    difference: Estimate
    corrected: Estimate | None = None
    level: float = 0.95
    verdict: Verdict
    detectable: float
    z: float | None = None
    definition: str = ""
    row_values: str = ""

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        gap = self.adapter.value - self.base.value
        slack = _ROUNDING * max(1.0, abs(self.adapter.value), abs(self.base.value))
        for one in (self.difference, self.corrected):
            if one is not None and math.isfinite(gap) and abs(one.value - gap) > slack:
                raise ValueError(
                    f"{self.metric}: the difference {one.value:.6g} is not adapter less base, "
                    f"{self.adapter.value:.6g} - {self.base.value:.6g}"
                )
        if self.verdict != self.shown:
            raise ValueError(f"{self.metric}: the verdict is {self.verdict!r}, and its interval says {self.shown!r}")
        return self

    @property
    def shown(self) -> Verdict:
        """The verdict computed from the intervals."""
        return verdict_of(self.better, self.difference, self.corrected)

    @property
    def gain(self) -> tuple[float, float]:
        """The plain interval of the difference as a gain: the harmful end first, whichever way is better."""
        ends = (self.difference.low, self.difference.high)
        return ends if self.better == "higher" else (-ends[1], -ends[0])

    @property
    def too_few(self) -> bool:
        """Whether so few rows could have shown no difference at all: fewer than a sign test needs, or of a share more
        than 100%."""
        return self.rows < rows_needed(self.level) or (self.unit == "%" and self.detectable > 100)

    @property
    def reach(self) -> str:
        """What so many rows would have shown, where they showed nothing."""
        rows = f"these {self.rows:,} rows"
        return f"{rows} are too few to show any" if self.too_few else f"{rows} show {self.detectable:.3g} or more"

    @property
    def told(self) -> str:
        """The verdict in words; none for a distance from the base, which is never better."""
        return self.verdict if self.metric != "kl" else ""


class DataUsed(Settings):
    """A file that was judged on: its name, the digest of its rows as used, and how many."""

    where: ClassVar[str] = "score card"
    error: ClassVar[type[PostilError]] = JudgeError

    name: str
    sha256: str
    rows: int
    tokens: int | None = None


class Part(Settings):
    """A set of measures on one data set. `main` names the measure that decides; slices: column → value → measures.

    few_shot: the bare base's value of each measure with examples in its prompt, `shots` of them. baselines: the
    adapter beside what needs no learning, by the baseline's name (few_shot, most_frequent, random_option,
    copy_prompt, copy_last_line, nearest_row) and measure; the Comparison's `base` is the baseline's value,
    paired by row.
    """

    where: ClassVar[str] = "score card"
    error: ClassVar[type[PostilError]] = JudgeError

    data: DataUsed
    main: str
    measures: dict[str, Comparison]
    few_shot: dict[str, Estimate] = Field(default_factory=dict)
    shots: int = 0
    baselines: dict[str, dict[str, Comparison]] = Field(default_factory=dict)
    slices: dict[str, dict[str, dict[str, Comparison]]] = Field(default_factory=dict)

    @property
    def counted(self) -> str:
        """How many rows there are, and as how many windows or questions they were measured where that differs."""
        found = self.measures.get(self.main)
        as_many = f" measured as {found.rows:,}" if found is not None and found.rows != self.data.rows else ""
        return f"{self.data.rows:,} rows{as_many}"

    @property
    def best_baseline(self) -> tuple[str, Comparison] | None:
        """The baseline that is best by the main measure, few-shot among them, and the adapter beside it."""
        return _best({name: found[self.main] for name, found in self.baselines.items() if self.main in found})

    def best_trivial(self, measure: str) -> tuple[str, Comparison] | None:
        """The best by a measure of the answers that need no learning, and the adapter beside it."""
        found = {name: one[measure] for name, one in self.baselines.items() if name != FEW_SHOT and measure in one}
        return _best(found)

    @property
    def verdict(self) -> Verdict:
        """What the main measure's intervals say: better only where it is better than the base, than the base with
        examples, and than the best of the other baselines; worse where it is worse than the base."""
        few, best = self.baselines.get(FEW_SHOT, {}).get(self.main), self.best_trivial(self.main)
        rivals = (few, best[1] if best is not None else None)
        asked = [self.measures[self.main], *(one for one in rivals if one is not None)]
        if all(one.shown == "better" for one in asked):
            return "better"
        return "worse" if asked[0].shown == "worse" else "no evidence"

    def told(self, measure: str) -> str:
        """The verdict on a measure in words, that of the main one beside every rival."""
        found = self.measures[measure]
        return self.verdict if measure == self.main and found.told else found.told


def _best(baselines: dict[str, Comparison]) -> tuple[str, Comparison] | None:
    sign = {"higher": 1, "lower": -1}
    return max(baselines.items(), key=lambda one: one[1].base.value * sign[one[1].better], default=None)


class CurvePoint(Settings):
    """The adapter's term scaled by `scale`: the target's main measure and general nats per token there."""

    where: ClassVar[str] = "score card"
    error: ClassVar[type[PostilError]] = JudgeError

    scale: float
    target: float | None = None
    target_nats: float | None = None
    general_nats: float | None = None


class Leakage(Settings):
    """Verbatim leakage: training rows continued word for word from their beginning, by adapter and by base.

    adapter, base, held_out: percentages of rows; held_out are rows of the target that the adapter never learned,
    so that what skill alone repeats is seen.
    """

    where: ClassVar[str] = "score card"
    error: ClassVar[type[PostilError]] = JudgeError

    rows: int
    prefix_tokens: int
    matched_tokens: int
    adapter: Estimate
    base: Estimate
    held_out: Estimate | None = None
    worst_rows: list[int] = Field(default_factory=list)


class Contamination(Settings):
    """How many of the rows judged on are known from the training: `target` rows of the target were trained on (of
    `target_rows`), `general` rows of the general sets were trained on or guarded with (of `general_rows`).

    A row is known by what it asks. Of the target's: `target_answers` were learned with an answer that it wants,
    `target_held_out` were not learned but held out, to choose the adapter's state by.
    """

    where: ClassVar[str] = "score card"
    error: ClassVar[type[PostilError]] = JudgeError

    target: int
    target_rows: int
    general: int
    general_rows: int
    target_answers: int = 0
    target_held_out: int = 0


class ScoreCard(Settings):
    """Everything measured of one adapter. `general` holds several parts by name: "nats", "kl", "chat", "choices",
    "pairs". scope: what the adapter may be asked, anything ("assistant") or its own task alone ("task").
    contamination: None where the adapter does not tell what it was trained on. chat_template: whether the base has
    one; None where nobody noted it."""

    where: ClassVar[str] = "score card"
    error: ClassVar[type[PostilError]] = JudgeError

    format: Literal[1] = 1
    base: dict[str, str]  # source and form of the fingerprint
    adapter_sha256: str  # of adapter_model.safetensors and adapter_config.json
    target: Part | None = None
    general: dict[str, Part] = Field(default_factory=dict)
    null_adapters: int = 0
    curve: list[CurvePoint] = Field(default_factory=list)
    leakage: Leakage | None = None
    contamination: Contamination | None = None
    scope: Literal["assistant", "task"] = "assistant"
    chat_template: bool | None = None
    command: str  # reproduces this card
    seed: int = 0
    versions: dict[str, str] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)

    def find(self, path: str) -> Any:
        """The Comparison that a dotted path means: "target.bleu", "target" (its main one), "general.nats",
        "target.intent=refund.accuracy" (a slice). Raises JudgeError with the nearest known path."""
        from postil.judging.card.paths import find

        return find(self, path)
