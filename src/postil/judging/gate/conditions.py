"""One condition of a gate answered from a score card: a comparison or a verdict, of the whole set or every slice."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from postil.errors import JudgeError, listed, nearest
from postil.judging.card.model import Comparison, Part, ScoreCard
from postil.judging.gate.expression import Compare, Judged, Leaf, leaves, parse

GENERAL = {"nats": "--general FILE", "kl": "--general FILE", "choices": "--choices FILE", "pairs": "--pairs FILE"}
SIGN_WORDS = {"<": "below", "<=": "at most", ">": "above", ">=": "at least"}


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison or verdict of the expression, answered.

    left, right: the two numbers compared, or the verdict found and the one wanted; None where there was no
    answer. broke: this one is why the gate refused. slices: the slices ("column=value") that failed it.
    """

    text: str
    left: float | str | None
    right: float | str | None
    passed: bool
    sentence: str
    broke: bool = False
    slices: tuple[str, ...] = ()


class NoAnswer(Exception):
    """A condition that this card cannot answer: the gate refuses, whatever else the expression says."""


@dataclass(frozen=True, slots=True)
class _Item:
    """What a condition is held against: one measure, or one slice's."""

    label: str
    measure: Comparison
    part: Part
    slice: tuple[str, str, str] | None = None  # column, value, name of the measure


def check_measures(expression: str, target: Collection[str] | None, general: Mapping[str, Collection[str]]) -> None:
    """Raise JudgeError, before any work, where the expression names a measure that the card will not have.

    target: the measures of answers to come, None without a target; general: those of each general part to come. A
    slice is known only later, and what is left out altogether is the gate's to refuse.
    """
    parts = {"target": target or ()} | {f"general.{name}": names for name, names in general.items()}
    known = {*parts, *(f"{part}.{name}" for part, names in parts.items() for name in names)}
    for leaf in leaves(parse(expression)):
        root, _, rest = leaf.path.partition(".")
        absent = target is None if root != "general" else rest.partition(".")[0] in {*GENERAL} - {*general}
        if absent or leaf.path in known or (root != "slices" and "=" in leaf.path):
            continue
        if root == "slices" and (not rest or rest in parts["target"]):
            continue
        near = nearest(leaf.path, known) or f"; it will hold {listed(sorted(known))}"
        raise JudgeError(
            f"gate expression, column {leaf.column}: the score card will hold no measure {leaf.path!r}{near}"
        )


def answer(leaf: Leaf, card: ScoreCard, live: ScoreCard | None) -> Condition:
    """The condition `leaf` answered from `card`; `live` is the card of the version in service, None for the base.

    Raises NoAnswer where the card, or the other one, cannot say; JudgeError for a measure that no card has.
    """
    items = list(_items(leaf, card))
    answered = [_judged(leaf, item) if isinstance(leaf, Judged) else _compared(leaf, item, live) for item in items]
    broken = [(item, told) for item, told in zip(items, answered, strict=True) if not told.passed]
    first = broken[0][1] if broken else answered[0]
    if items[0].slice is None:
        return replace(first, text=str(leaf))
    slices = tuple("=".join(item.slice[:2]) for item, _ in broken if item.slice is not None)
    if not broken:
        return replace(first, text=str(leaf), sentence=f"{leaf} in each of {len(items)} slices")
    sentence = first.sentence
    if len(broken) > 1:
        sentence += f", and so for {len(broken) - 1} more of {len(items)} slices: {listed(slices[1:])}"
    return replace(first, text=str(leaf), sentence=sentence, slices=slices)


def _items(leaf: Leaf, card: ScoreCard) -> Iterator[_Item]:
    root, _, rest = leaf.path.partition(".")
    if root != "general" and card.target is None:
        raise NoAnswer("the card holds no target; judge the adapter again with --target FILE")
    if root == "slices" and card.target is not None:
        yield from _slices(leaf, card.target, rest)
        return
    name = rest.partition(".")[0]
    measured = [known for known, part in card.general.items() if part.measures]
    if root == "general" and name in GENERAL and name not in measured:
        raise NoAnswer(f"the card holds no general.{name}; judge the adapter again with {GENERAL[name]}")
    found = _find(card, leaf)
    yield _Item(leaf.path, found, _part_of(card, found))


def _slices(leaf: Leaf, target: Part, measure: str) -> Iterator[_Item]:
    name = measure or target.main
    if not any(target.slices.values()):
        raise NoAnswer("the card holds no slices; judge the adapter again with --slices COLUMN")
    if name not in target.measures:
        known = ", ".join(sorted(target.measures))
        raise JudgeError(f"gate expression, column {leaf.column}: no slice has a measure {name!r}; known: {known}")
    for column, values in target.slices.items():
        for value, measures in values.items():
            if name not in measures:
                raise NoAnswer(f"slice {column}={value} was not judged by {name}; judge the adapter again")
            yield _Item(f"slice {column}={value}: {name}", measures[name], target, (column, value, name))


def _find(card: ScoreCard, leaf: Leaf) -> Comparison:
    try:
        found = card.find(leaf.path)
    except JudgeError as problem:
        raise JudgeError(f"gate expression, column {leaf.column}: {problem}") from None
    if not isinstance(found, Comparison):
        raise JudgeError(f"gate expression, column {leaf.column}: {leaf.path!r} is not one measure; name one in it")
    return found


def _part_of(card: ScoreCard, found: Comparison) -> Part:
    """The part of the card that a measure belongs to."""
    for part in (card.target, *card.general.values()):
        if part is not None and any(found is known for known in _all(part)):
            return part
    raise JudgeError(f"{found.metric} is in no part of the score card")


def _all(part: Part) -> Iterator[Comparison]:
    yield from part.measures.values()
    for values in part.slices.values():
        for measures in values.values():
            yield from measures.values()


def _judged(leaf: Judged, item: _Item) -> Condition:
    _check(item.label, item.measure)
    m = item.measure
    passed = (m.verdict == leaf.verdict) is not leaf.negated
    told = f"is {leaf.verdict}" if m.verdict == leaf.verdict else f"is not {leaf.verdict}"
    base, adapter = _texts(m.base.value, m.adapter.value)
    sentence = (
        f"{item.label} {told} than the base's: {_unit(base, m)} → {_unit(adapter, m)}, "
        f"difference {_short(m.difference.value)} [{_short(m.difference.low)}, {_short(m.difference.high)}]"
    )
    if m.verdict == "no evidence":
        sentence += f", no evidence either way ({m.reach})"
    return Condition("", m.verdict, f"{'not ' if leaf.negated else ''}{leaf.verdict}", passed, sentence)


def _compared(leaf: Compare, item: _Item, live: ScoreCard | None) -> Condition:
    _check(item.label, item.measure)
    m = item.measure
    left = m.adapter.value if not leaf.end else m.base.value + getattr(m.difference, leaf.end)
    anchor, aside = _anchor(leaf, item, live)
    right = anchor + leaf.offset
    if not (math.isfinite(left) and math.isfinite(right)):
        raise NoAnswer(f"{item.label} is no finite number there, so nothing can be said about {leaf}")
    passed = {"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[leaf.sign]
    here, there = _texts(left, right)
    bound = f"{leaf.right}{aside} = {there}" if leaf.anchor else there
    label = f"{item.label}.{leaf.end}" if leaf.end else item.label
    sentence = f"{label} {here} is {'' if passed else 'not '}{SIGN_WORDS[leaf.sign]} {bound}"
    return Condition("", left, right, passed, sentence)


def _anchor(leaf: Compare, item: _Item, live: ScoreCard | None) -> tuple[float, str]:
    """The value that the right side starts from, and a remark on it."""
    if not leaf.anchor:
        return 0.0, ""
    if leaf.anchor == "few_shot":
        return _few_shot(item), f" ({item.part.shots} shots)"
    if leaf.anchor == "live" and live is not None:
        return _in_service(leaf, item, live).adapter.value, ""
    remark = " (no version in service: the base)" if leaf.anchor == "live" else ""
    return item.measure.base.value, remark


def _few_shot(item: _Item) -> float:
    name = next((name for name, known in item.part.measures.items() if known is item.measure), None)
    if name is None:
        raise NoAnswer(f"{item.label} is a slice, and few_shot is known for the whole set only")
    if name not in item.part.few_shot:
        raise NoAnswer(
            f"the card holds no few-shot value of {item.label}; judge it again with --shots 4 --train FILE"
        )
    return item.part.few_shot[name].value


def _in_service(leaf: Leaf, item: _Item, live: ScoreCard) -> Comparison:
    """The same measure of the version in service, on the same rows."""
    again = "judge it again on the same rows, or compare with base"
    try:
        if item.slice is not None:
            column, value, name = item.slice
            found = live.target.slices[column][value][name] if live.target is not None else None
        else:
            found = live.find(leaf.path)
    except (JudgeError, KeyError):
        found = None
    if not isinstance(found, Comparison):
        raise NoAnswer(f"the version in service was not judged by {item.label}; {again}")
    theirs = _part_of(live, found).data
    if theirs.sha256 != item.part.data.sha256:
        raise NoAnswer(
            f"{item.label} was judged on other rows ({item.part.data.name}) than the version in service "
            f"({theirs.name}), so they cannot be compared; {again}"
        )
    _check(f"{item.label} of the version in service", found)
    return found


def _check(label: str, measure: Comparison) -> None:
    if not measure.rows:
        raise NoAnswer(f"{label} was measured on no rows; judge the adapter again on a set that has some")
    for who, value in (("adapter", measure.adapter.value), ("base", measure.base.value)):
        if not math.isfinite(value):
            raise NoAnswer(f"{label} is {value} for the {who}, no finite number: what answers so is broken")


def _texts(left: float, right: float) -> tuple[str, str]:
    """Both numbers with as many digits as it takes to tell them apart, four at least."""
    for digits in range(4, 18):
        here, there = f"{left:.{digits}g}", f"{right:.{digits}g}"
        if here != there or left == right:
            break
    return here, there


def _short(value: float) -> str:
    return f"{value:.3g}"


def _unit(text: str, measure: Comparison) -> str:
    return f"{text}{measure.unit}" if measure.unit == "%" else f"{text} {measure.unit}".rstrip()
