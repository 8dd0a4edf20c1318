"""A measure held against a number, the base, the base with examples, trivial answers, or the version in service."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from postil.errors import JudgeError
from postil.judging.bootstrap import compare
from postil.judging.card.build import OTHERS, measured, stats_of
from postil.judging.card.model import Comparison, Estimate, ScoreCard
from postil.judging.card.row_values import unpacked
from postil.judging.gate.expression import Compare
from postil.judging.gate.items import Condition, Item, NoAnswer, check_finite, check_interval, ends, sides, two
from postil.judging.gate.verdicts import apart, best_trivial, few_shot

SIGN_WORDS = {"<": "below", "<=": "at most", ">": "above", ">=": "at least"}
AGAIN = "judge it again in the same way, or compare with base"


@dataclass(frozen=True, slots=True)
class _Anchor:
    """The value that the right side starts from, what the adapter's differs from it by, and a remark on it."""

    value: float
    gap: Estimate
    remark: str = ""


def compared(leaf: Compare, item: Item, card: ScoreCard, live: ScoreCard | None) -> Condition:
    """`item sign right`; `live` is the card of the version in service. Raises NoAnswer where the cards cannot say."""
    check_finite(item.label, item.measure)
    if leaf.end:
        check_interval(item.label, item.measure)
    anchor = _anchor(leaf, item, card, live)
    left = anchor.value + getattr(anchor.gap, leaf.end) if leaf.end else item.measure.adapter.value
    right = (anchor.value if leaf.anchor else 0.0) + leaf.offset
    return answered(leaf, item.label, left, right, anchor.remark)


def answered(leaf: Compare, label: str, left: float, right: float, remark: str = "") -> Condition:
    """The two numbers held against each other, and the sentence."""
    if not (math.isfinite(left) and math.isfinite(right)):
        raise NoAnswer(f"{label} is no finite number there, so nothing can be said about {leaf}")
    passed = {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[leaf.sign]
    here, there = two(left, right)
    bound = f"{leaf.right}{remark} = {there}" if leaf.anchor else there
    shown = f"{label}.{leaf.end}" if leaf.end else label
    sentence = f"{shown} {here} is {'' if passed else 'not '}{SIGN_WORDS[leaf.sign]} {bound}"
    return Condition("", left, right, passed, sentence)


def _anchor(leaf: Compare, item: Item, card: ScoreCard, live: ScoreCard | None) -> _Anchor:
    m = item.measure
    if leaf.anchor == "few_shot":
        return _few_shot(item)
    if leaf.anchor == "trivial":
        return _trivial(item)
    if leaf.anchor == "live" and live is not None:
        found = in_service(item, card, live)
        gap = beside_live(item, found, card.seed)
        return _Anchor(found.adapter.value, gap, f" (row by row {ends(gap)})" if m.row_values else "")
    remark = " (no version in service: the base)" if leaf.anchor == "live" else ""
    return _Anchor(m.base.value, m.difference, remark)


def _few_shot(item: Item) -> _Anchor:
    if item.slice:
        raise NoAnswer(f"{item.label} is a slice, and few_shot is known for the whole set only")
    found = few_shot(item)
    if found is None:
        raise NoAnswer(
            f"the card holds no few-shot value of {item.label}; judge it again with --shots 4 --train FILE"
        )
    remark = f" ({item.part.shots} shots)"
    if isinstance(found, Comparison):
        return _Anchor(found.base.value, found.difference, remark)
    return _Anchor(found.value, apart(item.measure.adapter, found), remark)


def _trivial(item: Item) -> _Anchor:
    found = best_trivial(item)
    if found is None:
        raise NoAnswer(f"the card holds no trivial baselines of {item.label}; they are of the whole target's answers")
    name, rival = found
    return _Anchor(rival.base.value, rival.difference, f" ({name})")


def in_service(item: Item, card: ScoreCard, live: ScoreCard) -> Comparison:
    """The same measure of the version in service. Raises NoAnswer unless base, rows and definition are the same."""
    if live.base.get("source") != card.base.get("source"):
        raise NoAnswer(
            f"the version in service belongs to another base ({live.base.get('source')}) than this one "
            f"({card.base.get('source')}), so they cannot be compared; compare with base"
        )
    try:
        found = live.find(item.path)
    except JudgeError:
        found = None
    if not isinstance(found, Comparison):
        raise NoAnswer(f"the version in service was not judged by {item.label}; {AGAIN}")
    theirs = next(part.data for _, where, part in sides(live) if where == item.where)
    if theirs.sha256 != item.part.data.sha256:
        raise NoAnswer(
            f"{item.label} was judged on other rows ({item.part.data.name}) than the version in service "
            f"({theirs.name}), so they cannot be compared; {AGAIN}"
        )
    if item.slice.endswith(f"={OTHERS}") and found.rows != item.measure.rows:
        raise NoAnswer(
            f"{item.label} pools other values than that of the version in service ({item.measure.rows:,} rows, and "
            f"{found.rows:,} live), so they cannot be compared; {AGAIN}"
        )
    if found.definition != item.measure.definition or found.better != item.measure.better:
        raise NoAnswer(
            f"{item.label} is defined otherwise than for the version in service (its options or its own file, how "
            f"answers are asked for, or the base's form; cards of before have no definition), so they cannot be "
            f"compared; {AGAIN}"
        )
    check_finite(f"{item.label} of the version in service", found)
    return found


def beside_live(item: Item, live: Comparison, seed: int) -> Estimate:
    """The adapter's value less that of the version in service, with its interval: paired row by row where both cards
    keep their rows' values, else from the two's own intervals. Raises NoAnswer for values that are not of these rows.
    """
    m = item.measure
    if not m.row_values or not live.row_values:
        return apart(m.adapter, live.adapter)
    try:
        mine, theirs = unpacked(m.row_values), unpacked(live.row_values)
    except JudgeError as problem:
        raise NoAnswer(f"{item.label}: {problem}") from None
    if len(mine) != len(theirs):
        raise NoAnswer(f"{item.label} keeps the values of {len(mine):,} rows, and of {len(theirs):,} live; {AGAIN}")
    both = np.isfinite(mine) & np.isfinite(theirs)
    if not both.any():
        return apart(m.adapter, live.adapter)
    before, after = (stats_of([(float(value), 1) for value in found[both]]) for found in (theirs, mine))
    metric = measured(m.metric, m.better, "")  # no unit: a pseudo-value is no share
    found = compare(metric, before, after, seed=seed, level=max(m.level, live.level)).difference
    gap = m.adapter.value - live.adapter.value
    shift = gap - found.value  # the pseudo-values' mean is near a corpus measure's value, not equal to it
    return Estimate(value=gap, low=min(found.low + shift, gap), high=max(found.high + shift, gap))
