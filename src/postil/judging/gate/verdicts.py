"""Verdicts of one measure, computed from its intervals: better than all there is to beat, worse, or kept."""

from __future__ import annotations

import math

from postil.judging.card.model import FEW_SHOT, Comparison, Estimate, rows_needed
from postil.judging.gate.expression import Judged
from postil.judging.gate.items import Condition, Item, NoAnswer, check_finite, check_interval, ends, two, with_unit
from postil.judging.gate.margins import CHAT, allowed, bound, too_little, within


def judged(leaf: Judged, item: Item) -> Condition:
    """`item is [not] better | worse | kept`. Raises NoAnswer where the card cannot say."""
    check_finite(item.label, item.measure)
    check_interval(item.label, item.measure)
    if leaf.verdict == "kept":
        return _kept(leaf, item)
    found, sentence = _beside_base(leaf, item), _told(leaf, item.label, "the base's", item.measure)
    if leaf.verdict == "better" and found == "better":
        beaten, sentence = _beside_rivals(item, sentence)
        found = "better" if beaten else "not better"
    passed = (found == leaf.verdict) is not leaf.negated
    return Condition("", found, f"{'not ' if leaf.negated else ''}{leaf.verdict}", passed, sentence)


def apart(one: Estimate, other: Estimate) -> Estimate:
    """one − other with its interval, from the two's own (MOVER; Zou and Donner 2008): what there is without pairs."""
    gap = one.value - other.value
    down = math.hypot(one.value - one.low, other.high - other.value)
    up = math.hypot(one.high - one.value, other.value - other.low)
    return Estimate(value=gap, low=gap - down, high=gap + up)


def best_trivial(item: Item) -> tuple[str, Comparison] | None:
    """The best of the answers that need no learning, by name, with the adapter beside it."""
    return None if item.where != "target" or item.slice else item.part.best_trivial(item.name)


def few_shot(item: Item) -> Comparison | Estimate | None:
    """The base with examples: the adapter beside it row by row, or its value alone."""
    if item.slice:
        return None
    return item.part.baselines.get(FEW_SHOT, {}).get(item.name) or item.part.few_shot.get(item.name)


def _beside_base(leaf: Judged, item: Item) -> str:
    m = item.measure
    if leaf.verdict == "worse" and m.shown != "worse" and m.rows < rows_needed(m.level):
        raise NoAnswer(f"{item.label}: {_too_few(m)}")
    return m.shown


def _told(leaf: Judged, label: str, whose: str, m: Comparison) -> str:
    base, adapter = two(m.base.value, m.adapter.value)
    is_so = m.shown == leaf.verdict
    sentence = (
        f"{label} is {'' if is_so else 'not '}{leaf.verdict} than {whose}: {with_unit(base, m.unit)} → "
        f"{with_unit(adapter, m.unit)}, difference {ends(m.difference)}"
    )
    if m.shown != "no evidence":
        return sentence
    if m.corrected is not None and m.gain[0] > 0:
        sentence += f", [{m.corrected.low:.3g}, {m.corrected.high:.3g}] for all slices looked at"
    return f"{sentence}, no evidence either way ({m.reach})"


def _beside_rivals(item: Item, sentence: str) -> tuple[bool, str]:
    """Whether the adapter is better than the base with examples and the best trivial answers too, and the words."""
    if item.where != "target" or item.slice:
        return True, sentence
    better = Judged(item.path, False, "better")
    few = few_shot(item)
    if isinstance(few, Estimate):
        gap = apart(item.measure.adapter, few)
        gain = gap.low if item.measure.better == "higher" else -gap.high
        value = with_unit(f"{few.value:.4g}", item.measure.unit)
        if not gain > 0:
            return False, (
                f"{item.label} is not better than the base's with {item.part.shots} examples: {value} → "
                f"{with_unit(f'{item.measure.adapter.value:.4g}', item.measure.unit)}, difference {ends(gap)}"
            )
        sentence += f", than with {item.part.shots} examples ({value})"
    elif few is not None:
        check_interval(f"{item.label} beside the base with examples", few)
        if few.shown != "better":
            return False, _told(better, item.label, f"the base's with {item.part.shots} examples", few)
        sentence += f", than with {item.part.shots} examples ({with_unit(f'{few.base.value:.4g}', few.unit)})"
    if item.name == "nats":  # likelihoods, not answers: nothing trivial to beat
        return True, sentence
    trivial = best_trivial(item)
    if trivial is None:
        raise NoAnswer(
            f"the card holds no trivial baselines of {item.label} (the most frequent answer, a copy of the prompt), "
            "so nobody knows what the gain is worth; judge the adapter again"
        )
    name, rival = trivial
    check_finite(f"{item.label} of {name}", rival)
    check_interval(f"{item.label} beside {name}", rival)
    if rival.shown != "better":
        return False, _told(better, item.label, f"the best trivial baseline's, {name}", rival)
    value = with_unit(f"{rival.base.value:.4g}", rival.unit)
    return True, f"{sentence}, and than the best trivial baseline's, {name} ({value}, {ends(rival.difference)})"


def _kept(leaf: Judged, item: Item) -> Condition:
    """Not worse beyond its margin, by the harmful end of the interval."""
    m = item.measure
    if item.where != "target" and not item.slice and (short := too_little(item.where, item.part)):
        raise NoAnswer(f"{item.label} is too little to say anything: {short}; judge the adapter again on more")
    if m.rows < rows_needed(m.level):
        raise NoAnswer(f"{item.label}: {_too_few(m)}")
    sliced = bool(item.slice)
    margin, most = allowed(item.where, item.name, m, sliced=sliced), bound(item.where, item.name, m, sliced=sliced)
    kept = within(item.where, item.name, m, sliced=sliced)
    base, adapter = two(m.base.value, m.adapter.value)
    moved = f"{with_unit(base, m.unit)} → {with_unit(adapter, m.unit)}, difference {ends(m.difference)}"
    if kept:
        told, sentence = "kept", f"{item.label} is kept: {moved}, {most} allowed"
    elif m.difference.value * (-1 if m.better == "lower" else 1) < -margin:
        told, sentence = "worse", f"{item.label} is worse than allowed: {moved}, {most} allowed"
    else:
        told = "too few rows to say"
        sentence = (
            f"{item.label} may be worse than allowed: {moved}, {most} allowed; {m.rows:,} rows are too few to say: "
            f"judge on more{_pool(item)}, or say a bound of your own: {_bound(item, margin)}"
        )
    return Condition("", told, f"{'not ' if leaf.negated else ''}kept", kept is not leaf.negated, sentence)


def _pool(item: Item) -> str:
    return ", pool small slices with --set smallest_slice" if item.slice else ""


def _bound(item: Item, margin: float) -> str:
    path = f"slices.{item.name}" if item.slice else item.label
    if item.measure.better == "lower":
        return f"{path}.high < base + {2 * margin:.3g}"
    return f"{path}.low > base - {2 * margin:.3g}"


def _too_few(m: Comparison) -> str:
    return f"{m.rows:,} rows are too few to say whether it is worse; judge on more, or pool them with other slices"


def ways_on(where: str) -> str:
    """What a user can do about damage in a general part, for the end of a refusal."""
    if where != CHAT:
        return ""
    return (
        "hold chats while it is trained (chat rows in `general`, for the guard and kl_weight), or, for a note that "
        "is only ever asked its own task, judge it with --scope task"
    )
