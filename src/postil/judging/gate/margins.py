"""What the gate allows by default: how much worse a measure may be, and how much data it takes to say so."""

from __future__ import annotations

from dataclasses import dataclass

from postil.judging.card.model import Comparison, Part
from postil.judging.metrics.own import PREFIX

CHAT = "chat"


@dataclass(frozen=True, slots=True)
class Margin:
    """How much worse: `amount` in the measure's own unit, or a `share` of the base's value where the unit is not
    known beforehand."""

    amount: float = 0.0
    share: float = 0.0

    def of(self, measure: Comparison) -> float:
        """The amount for one measure."""
        return self.share * abs(measure.base.value) if self.share else self.amount


# By general part and measure. KL of prose lies at 0.03 to 0.06 for notes held by KL while they were trained and at
# 0.23 for one that was not (docs/evidence.md). Of chat (bench/off_task.py): a note that answers all with its label
# lies 0.79 nats above the base at a KL of 0.75, begins no answer as the base does and gives one answer to all; held
# as by default it lies at +0.010, 0.010, 76 of 100 and none. A small base's answers part early, at a small KL.
GENERAL = {
    ("nats", "nats"): Margin(0.05),
    ("kl", "kl"): Margin(0.15),
    (CHAT, "nats"): Margin(0.05),
    (CHAT, "kl"): Margin(0.15),
    (CHAT, "same_start"): Margin(40),
    (CHAT, "alike"): Margin(5),
}
# Every other measure (choices, pairs, lm-eval's tasks, the target): by its unit. 0.05 nats are a factor of 1.05 in
# perplexity and, at some four bytes a token, 0.02 bits a byte.
WHOLE = {"%": Margin(2), "points": Margin(2), "nats/token": Margin(0.05), "bits/byte": Margin(0.02)}
OTHERWISE = Margin(share=0.05)
# Slices have few rows and so wide intervals; what is allowed there is coarse.
SLICE = {"%": Margin(10), "points": Margin(10), "nats/token": Margin(0.25)}
SLICE_OTHERWISE = Margin(share=0.1)
LEAKED = 5.0  # points that more training rows may come back than base or skill alone would give

TOKENS = {"nats": 8_192, "kl": 8_192}  # of running text, at least, for anything to be said
ROWS = {CHAT: 50}
ROWS_OTHERWISE = 100


def allowed(part: str, name: str, measure: Comparison, *, sliced: bool = False) -> float:
    """How much worse than the base a measure may be, in its own unit. part: "target" or a general part's name."""
    own = name.startswith(PREFIX)  # its scale is its author's, whatever the unit is called
    whole = (GENERAL.get((part, name)) or (OTHERWISE if own else WHOLE.get(measure.unit, OTHERWISE))).of(measure)
    if not sliced:
        return whole
    return max(whole, (SLICE_OTHERWISE if own else SLICE.get(measure.unit, SLICE_OTHERWISE)).of(measure))


def within(part: str, name: str, measure: Comparison, *, sliced: bool = False) -> bool:
    """Whether the harmful end of the interval lies within what is allowed."""
    return measure.gain[0] >= -allowed(part, name, measure, sliced=sliced)


def bound(part: str, name: str, measure: Comparison, *, sliced: bool = False) -> str:
    """What is allowed, in words: `+0.05 nats/token`, `-2 points`."""
    sign, unit = "+" if measure.better == "lower" else "-", "points" if measure.unit == "%" else measure.unit
    return f"{sign}{allowed(part, name, measure, sliced=sliced):.3g} {unit}".rstrip()


def held(name: str, part: Part) -> list[str]:
    """The measures of a general part that must be kept: its main one, and of chat all that have a margin."""
    more = [one for one in part.measures if name == CHAT and (name, one) in GENERAL]
    return list(dict.fromkeys([part.main, *more]))


def too_little(name: str, part: Part) -> str:
    """What a general part is short of ("480 tokens, and it takes 8,192"); nothing where it has enough."""
    if name in TOKENS:
        tokens = part.data.tokens or 0
        return f"{tokens:,} tokens, and it takes {TOKENS[name]:,}" if tokens < TOKENS[name] else ""
    found = part.measures.get(part.main)
    rows, least = found.rows if found is not None else 0, ROWS.get(name, ROWS_OTHERWISE)
    return f"{rows:,} rows, and it takes {least:,}" if rows < least else ""
