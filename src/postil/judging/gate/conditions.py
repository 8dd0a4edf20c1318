"""The conditions of a gate's expression answered from a score card, one by one, and its slips found beforehand."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from postil.errors import JudgeError, listed, nearest
from postil.judging.card.model import ScoreCard
from postil.judging.gate.comparisons import compared
from postil.judging.gate.expression import Judged, Leaf, leaves, parse
from postil.judging.gate.items import FLAGS, Condition, Item, NoAnswer, items_of, named, others
from postil.judging.gate.probed import CONTAMINATION, LEAKAGE, contaminated, leaked
from postil.judging.gate.verdicts import judged


def check_measures(expression: str, target: Collection[str] | None, general: Mapping[str, Collection[str]]) -> None:
    """Raise JudgeError, before any work, where the expression names a measure that the card will not have.

    target: the measures of answers to come, None without a target; general: those of each general part to come. A
    slice is known only later, and what is left out altogether is the gate's to refuse.
    """
    parts = {"target": target or ()} | {f"general.{name}": names for name, names in general.items()}
    known = {*parts, *(f"{part}.{name}" for part, names in parts.items() for name in names), "general"}
    known |= {"leakage", *(f"leakage.{name}" for name in LEAKAGE)}
    known |= {"contamination", *(f"contamination.{name}" for name in CONTAMINATION)}
    for leaf in leaves(parse(expression)):
        root, _, rest = leaf.path.partition(".")
        absent = target is None if root == "target" else rest.partition(".")[0] in {*FLAGS} - {*general}
        whole = f"{leaf.path}.{getattr(leaf, 'end', '')}"  # own.low is a measure
        if absent or leaf.path in known or whole in known or (root != "slices" and "=" in leaf.path):
            continue
        if root == "slices" and (not rest or any(rest in names for names in parts.values())):
            continue
        near = nearest(leaf.path, known) or f"; it will hold {listed(sorted(known))}"
        raise JudgeError(
            f"gate expression, column {leaf.column}: the score card will hold no measure {leaf.path!r}{near}"
        )


def answer(leaf: Leaf, card: ScoreCard, live: ScoreCard | None) -> Condition:
    """The condition `leaf` answered from `card`; `live` is the card of the version in service, None for the base.

    Raises NoAnswer where the card, or the other one, cannot say; JudgeError for a measure that no card has.
    """
    asked = named(leaf, card)
    root = asked.path.partition(".")[0]
    if root in ("leakage", "contamination"):
        found = leaked(asked, card) if root == "leakage" else contaminated(asked, card)
        return replace(found, text=str(leaf))
    items = items_of(asked, card)
    if root != "slices":
        return replace(_answered(asked, items[0], card, live), text=str(leaf))
    return _each(asked, items, card, live)


def _answered(leaf: Leaf, item: Item, card: ScoreCard, live: ScoreCard | None) -> Condition:
    return judged(leaf, item) if isinstance(leaf, Judged) else compared(leaf, item, card, live)


def _each(leaf: Leaf, items: list[Item], card: ScoreCard, live: ScoreCard | None) -> Condition:
    """Every slice; one that fails counts before one that cannot be answered."""
    broken, unknown = list[tuple[Item, Condition]](), list[tuple[Item, NoAnswer]]()
    for item in items:
        try:
            found = _answered(leaf, item, card, live)
        except NoAnswer as reason:
            unknown.append((item, reason))
        else:
            if not found.passed:
                broken.append((item, found))
    if broken:
        failed = [item for item, _ in broken]
        first = broken[0][1]
        return replace(first, text=str(leaf), sentence=first.sentence + others(failed, len(items)),
                       slices=tuple(item.slice for item in failed))  # fmt: skip
    if unknown:
        raise NoAnswer(str(unknown[0][1]) + others([item for item, _ in unknown], len(items)))
    first = _answered(leaf, items[0], card, live)
    return replace(first, text=str(leaf), sentence=f"{leaf} in each of {len(items)} slices")
