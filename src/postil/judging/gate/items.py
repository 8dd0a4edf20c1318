"""What a condition is held against: the measure of a card that its path means, or those of every slice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from postil.errors import JudgeError, listed
from postil.judging.card.model import Comparison, Estimate, Part, ScoreCard
from postil.judging.card.paths import paths
from postil.judging.gate.expression import Compare, Leaf

LEVEL = 0.95  # of the intervals, at least: narrower ones would let anything through
FLAGS = {
    "nats": "with --general FILE",
    "kl": "with --general FILE",
    "choices": "with --choices FILE",
    "pairs": "with --pairs FILE",
    "chat": "(chats are measured by default where the base has a template)",
}


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
class Item:
    """One measure. label: how sentences call it; path: where it stands in a card; where: "target" or the general
    part's name; name: the measure's; slice: "column=value", with the part before it where that is a general one."""

    label: str
    path: str
    measure: Comparison
    part: Part
    where: str
    name: str
    slice: str = ""


def items_of(leaf: Leaf, card: ScoreCard) -> list[Item]:
    """The measure that a leaf's path means, or each slice's where it begins with `slices`.

    Raises NoAnswer where the card holds none, JudgeError for a measure that no card has.
    """
    root, _, rest = leaf.path.partition(".")
    if root == "slices":
        return _slices(leaf, card, rest)
    if root == "target" and card.target is None:
        raise NoAnswer("the card holds no target; judge the adapter again with --target FILE")
    name = rest.partition(".")[0]
    measured = [known for known, part in card.general.items() if part.measures]
    if root == "general" and name in FLAGS and name not in measured:
        raise NoAnswer(f"the card holds no general.{name}; judge the adapter again {FLAGS[name]}")
    return [_found(card, leaf)]


def named(leaf: Leaf, card: ScoreCard) -> Leaf:
    """The leaf with its path as the card knows it: `own.low` may be a measure's name and no end of an interval."""
    if isinstance(leaf, Compare) and leaf.end:
        whole = f"{leaf.path}.{leaf.end}"
        if any(path == whole for path, _ in paths(card)):
            return replace(leaf, path=whole, end="")
    return leaf


def sides(card: ScoreCard) -> Iterator[tuple[str, str, Part]]:
    """(path, name, part) of target and general parts; the target's name is "target"."""
    if card.target is not None:
        yield "target", "target", card.target
    for name, part in card.general.items():
        yield f"general.{name}", name, part


def slices_of_part(path: str, where: str, part: Part, name: str) -> Iterator[Item]:
    """Each slice of a part by one measure; a slice that was not judged by it raises NoAnswer."""
    for column, values in part.slices.items():
        for value, measures in values.items():
            at = f"{path}.{column}={value}"
            shown = _shown(path, where, at)
            if name not in measures:
                raise NoAnswer(f"slice {shown} was not judged by {name}; judge the adapter again")
            yield Item(f"slice {shown}: {name}", f"{at}.{name}", measures[name], part, where, name, shown)


def _shown(path: str, where: str, at: str) -> str:
    """A slice's name: `intent=refund` of the target, `general.choices.subject=law` of a general part."""
    return at.removeprefix(f"{path}.") if where == "target" else at


def _slices(leaf: Leaf, card: ScoreCard, measure: str) -> list[Item]:
    parts = [(path, where, part) for path, where, part in sides(card) if any(part.slices.values())]
    if not parts:
        raise NoAnswer("the card holds no slices; judge the adapter again with --slices COLUMN")
    having = [one for one in parts if not measure or measure in one[2].measures]
    if not having:
        known = ", ".join(sorted({name for _, _, part in parts for name in part.measures}))
        raise JudgeError(f"gate expression, column {leaf.column}: no slice has a measure {measure!r}; known: {known}")
    return [one for path, where, part in having for one in slices_of_part(path, where, part, measure or part.main)]


def _found(card: ScoreCard, leaf: Leaf) -> Item:
    try:
        measure = card.find(leaf.path)
    except JudgeError as problem:
        raise JudgeError(f"gate expression, column {leaf.column}: {problem}") from None
    for path, where, part in sides(card):
        for name, known in part.measures.items():
            if known is measure:
                return Item(leaf.path, f"{path}.{name}", measure, part, where, name)
        for column, values in part.slices.items():
            for value, measures in values.items():
                for name, known in measures.items():
                    if known is measure:
                        at = f"{path}.{column}={value}"
                        return Item(leaf.path, f"{at}.{name}", measure, part, where, name, _shown(path, where, at))
    raise JudgeError(f"{measure.metric} is in no part of the score card")


def check_finite(label: str, measure: Comparison) -> None:
    """Raise NoAnswer for a measure of no rows, or with a value that is no finite number."""
    if not measure.rows:
        raise NoAnswer(f"{label} was measured on no rows; judge the adapter again on a set that has some")
    for who, value in (("adapter", measure.adapter.value), ("base", measure.base.value)):
        if not math.isfinite(value):
            raise NoAnswer(f"{label} is {value} for the {who}, no finite number: what answers so is broken")


def check_interval(label: str, measure: Comparison) -> None:
    """Raise NoAnswer for an interval that nothing can be read from."""
    if not math.isfinite(measure.difference.low + measure.difference.high):
        raise NoAnswer(f"{label} has an interval that is not finite; judge the adapter again")
    if measure.level < LEVEL:
        raise NoAnswer(
            f"{label} was judged with intervals of {measure.level:.0%}, and the gate reads those of {LEVEL:.0%} or "
            f"more; judge the adapter again without --set level"
        )


def two(left: float, right: float) -> tuple[str, str]:
    """Both numbers with as many digits as it takes to tell them apart, four at least."""
    for digits in range(4, 18):
        here, there = f"{left:.{digits}g}", f"{right:.{digits}g}"
        if here != there or left == right:
            break
    return here, there


def with_unit(text: str, unit: str) -> str:
    """`60%`, `2.9 nats/token`."""
    return f"{text}{unit}" if unit == "%" else f"{text} {unit}".rstrip()


def ends(found: Estimate) -> str:
    """A difference with its interval: 3 [2, 4]."""
    return f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}]"


def others(found: list[Item], count: int) -> str:
    """The rest of the slices that failed, for a sentence that names the first."""
    if len(found) < 2:
        return ""
    return f", and so for {len(found) - 1} more of {count} slices: {listed(one.slice for one in found[1:])}"
