"""A score card in one sentence: what was gained over all there is to beat, and what was lost beside what may be."""

from __future__ import annotations

from postil.judging.card.model import Comparison, Part, ScoreCard
from postil.judging.gate.expression import Judged
from postil.judging.gate.items import Item, NoAnswer, sides
from postil.judging.gate.margins import bound, held, within
from postil.judging.gate.verdicts import judged

ALWAYS = ("nats", "chat", "choices", "pairs")  # general parts that the sentence names; others where they are not kept


def sentence(card: ScoreCard) -> str:
    """The target's verdict, beside every rival, each general part's beside its bound, and the scope."""
    told = [_target(card.target)] if card.target is not None else []
    for path, name, part in sides(card):
        if name in ("target", "kl"):
            continue
        for measure in held(name, part):
            found = part.measures[measure]
            main = measure == part.main
            if (main and name in ALWAYS) or not within(name, measure, found):
                told.append(_general(path if main else f"{path}.{measure}", name, measure, found))
    if card.scope == "task":
        told.append("for its own task alone, so that no damage to chat counts (scope task)")
    text = "; ".join(told)
    return f"{text[0].upper()}{text[1:]}." if text else "Nothing was measured."


def number(value: float, measure: Comparison, sign: str = "") -> str:
    """A value of a measure with the digits that its unit deserves."""
    return f"{value:{sign}.{1 if measure.unit in ('%', 'points') else 3}f}"


def _target(part: Part) -> str:
    m = part.measures[part.main]
    if m.shown != "better":
        return _said(m, "on the target", part.main)
    item = Item(f"target.{part.main}", f"target.{part.main}", m, part, "target", part.main)
    try:
        found = judged(Judged(item.path, False, "better"), item)
    except NoAnswer:  # nothing to beat was measured
        return _said(m, "on the target", part.main)
    if not found.passed:
        return found.sentence
    best = part.best_baseline
    beside = f", and than {best[0].replace('_', ' ')} ({number(best[1].base.value, best[1])})" if best else ""
    return _said(m, "on the target", part.main) + beside


def _general(path: str, name: str, measure: str, m: Comparison) -> str:
    kept = "within" if within(name, measure, m) else "not surely within"
    return f"{_said(m, 'in general', path)}, {kept} the {bound(name, measure, m)} that the gate allows"


def _said(m: Comparison, where: str, name: str) -> str:
    moved = f"{name} {number(m.base.value, m)} → {number(m.adapter.value, m)} {m.unit}"
    if m.shown == "no evidence":
        return f"no evidence {where}: {moved}, and {m.reach}"
    gap = m.difference
    ends = f"{number(gap.low, m, '+')} to {number(gap.high, m, '+')}"
    return f"{m.shown} {where}: {moved} ({number(gap.value, m, '+')}, {ends})"
