"""The gate: a score card held against an expression; passed, or refused with the condition that broke."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from postil.errors import GateError, listed
from postil.judging.card.model import Comparison, Part, ScoreCard
from postil.judging.gate.comparisons import in_service
from postil.judging.gate.conditions import answer
from postil.judging.gate.expression import And, Compare, Judged, Leaf, Node, Not, Or, leaves, parse
from postil.judging.gate.items import Condition, Item, NoAnswer, sides, slices_of_part
from postil.judging.gate.margins import CHAT, held, too_little
from postil.judging.gate.verdicts import ways_on

DEFAULT = "target is better and general is kept"  # and MEASURED, each where the card holds it
MEASURED = ("slices is kept", "leakage is kept", "contamination is none")


@dataclass(frozen=True, slots=True)
class GateResult:
    """The gate's answer. worse: slices worse than the base's or than those of the version in service."""

    passed: bool
    expression: str
    conditions: tuple[Condition, ...]
    sentence: str
    worse: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a number that is not finite becomes None."""
        return {
            "passed": self.passed,
            "expression": self.expression,
            "sentence": self.sentence,
            "worse_slices": list(self.worse),
            "conditions": [
                {"text": c.text, "left": _plain(c.left), "right": _plain(c.right), "passed": c.passed,
                 "broke": c.broke, "sentence": c.sentence, "slices": list(c.slices)}
                for c in self.conditions
            ],
        }  # fmt: skip

    def junit(self, name: str = "adapter") -> str:
        """JUnit XML: a test case a condition, failed where it broke the gate; `name` is the case's class."""
        broke = sum(c.broke for c in self.conditions)
        counts = {"tests": str(len(self.conditions)), "failures": str(broke), "errors": "0", "skipped": "0"}
        suites = ET.Element("testsuites", counts)
        suite = ET.SubElement(suites, "testsuite", {"name": "postil gate", **counts})
        for c in self.conditions:
            case = ET.SubElement(suite, "testcase", {"classname": _printable(name), "name": _printable(c.text)})
            if c.broke:
                ET.SubElement(case, "failure", {"type": "GateError", "message": _printable(c.sentence)})
            else:
                ET.SubElement(case, "system-out").text = _printable(c.sentence)
        ET.indent(suites)
        return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(suites, encoding="unicode")}\n'


def check(card: ScoreCard, expression: str = DEFAULT, live: ScoreCard | None = None) -> GateResult:
    """Hold `card` against the expression; `live` is the card of the version in service.

    Where no version is in service the base is, so `live` then means the base. DEFAULT asks, where the card holds
    them, for slices, leakage and contamination too. `general is kept` asks every general part that was measured, and
    prose and (where the base has a template and the scope is "assistant") chat whether measured or not. A card that
    holds too little general data is refused unless the expression names a general measure itself, as is one whose
    measures named here are missing, not finite, or (for `live`) taken or defined otherwise. Raises JudgeError for an
    expression that cannot be read or names a measure that no card has.
    """
    tree = parse(expression)
    if tree == parse(DEFAULT):  # however it is written
        tree = And((*_parts(tree), *map(parse, _measured(card))))
    whole = _expanded(tree, card)
    answers: dict[Leaf, Condition] = {}
    blind = []
    for leaf in leaves(whole):
        try:
            answers[leaf] = answer(leaf, card, live)
        except NoAnswer as reason:
            answers[leaf] = Condition(str(leaf), None, None, False, str(reason))
            blind.append(answers[leaf])
    general = _unseen(card, tree)
    culprits = list(dict.fromkeys(general or blind or _culprits(whole, answers, wanted=True)))
    spared = _spared(card, tree)
    conditions = tuple(replace(c, broke=c in culprits) for c in (*general, *answers.values(), *spared))
    worse = _worse_slices(card, live)
    if not culprits:
        return GateResult(True, str(tree), conditions, f"passed: {'; '.join(c.sentence for c in conditions)}", worse)
    reasons = [c.sentence + (" (the gate wants it otherwise)" if c.passed else "") for c in culprits]
    unnamed = [name for name in worse if not any(name in c.slices for c in culprits)]
    if unnamed:
        reasons.append(f"slices that got worse: {listed(unnamed)}")
    if any(c.text.startswith(f"general.{CHAT}") and c.left is not None for c in culprits):
        reasons.append(f"two ways on: {ways_on(CHAT)}")
    return GateResult(False, str(tree), conditions, f"refused: {'; '.join(reasons)}", worse)


def refusal(result: GateResult) -> GateError:
    """The error that a refused result is raised as."""
    error = GateError(result.sentence)
    error.result = result
    return error


def unjudged(reason: str) -> GateResult:
    """The result for an adapter that has no score card, or none of its own."""
    return GateResult(False, "", (Condition("score card", None, None, False, reason, True),), f"refused: {reason}")


def _measured(card: ScoreCard) -> list[str]:
    """What DEFAULT asks beyond itself."""
    there = (any(any(part.slices.values()) for _, _, part in sides(card)), card.leakage, card.contamination)
    return [one for one, found in zip(MEASURED, there, strict=True) if found]


def _expanded(node: Node, card: ScoreCard) -> Node:
    """The tree with `general is kept` as the measures that it asks for."""
    if isinstance(node, Not):
        return Not(_expanded(node.part, card))
    if isinstance(node, And | Or):
        return type(node)(tuple(_expanded(part, card) for part in node.parts))
    if node.path != "general" or not isinstance(node, Judged):
        return node
    asks_chat = card.scope == "assistant"
    paths = ["general.nats"]
    if asks_chat and CHAT not in card.general and card.chat_template is not False:
        paths.append(f"general.{CHAT}")
    for name, part in card.general.items():
        if part.measures and (name != CHAT or asks_chat):
            paths += [f"general.{name}" if one == part.main else f"general.{name}.{one}" for one in held(name, part)]
    kept = And(tuple(Judged(path, False, "kept", node.column) for path in dict.fromkeys(paths)))
    return Not(kept) if node.negated else kept


def _spared(card: ScoreCard, tree: Node) -> list[Condition]:
    """What the card's scope leaves out, said."""
    asked = any(leaf.path == "general" for leaf in leaves(tree))
    if card.scope == "assistant" or not asked:
        return []
    sentence = f"scope is {card.scope}: general.{CHAT} is not asked, since the note answers its own task alone"
    return [Condition("scope", card.scope, None, True, sentence)]


def _unseen(card: ScoreCard, tree: Node) -> list[Condition]:
    """The refusal of a card that nobody could have seen damage in."""
    parts = {name: part for name, part in card.general.items() if part.data.rows and part.measures}
    if not parts:
        sentence = (
            "the card holds no general data, so nobody has looked for damage; "
            "judge the adapter again without --general none, which leaves it out"
        )
        return [Condition("general data", None, None, False, sentence)]
    short = {name: too_little(name, part) for name, part in parts.items()}
    if not all(short.values()) or any(leaf.path.startswith("general") for leaf in leaves(tree)):
        return []
    told = listed(f"general.{name} has {what}" for name, what in short.items())
    sentence = (
        f"the card's general data are too little to show damage: {told}; judge the adapter again on more, or name a "
        "general measure in the expression"
    )
    return [Condition("general data", None, None, False, sentence)]


def _culprits(node: Node, answers: Mapping[Leaf, Condition], wanted: bool) -> list[Condition]:
    """The conditions for which `node` is not as wanted; none where it is."""
    if isinstance(node, Compare | Judged):
        return [] if answers[node].passed is wanted else [answers[node]]
    if isinstance(node, Not):
        return _culprits(node.part, answers, not wanted)
    found = [_culprits(part, answers, wanted) for part in node.parts]
    if isinstance(node, And) is not wanted and not all(found):
        return []  # one part suffices, and one is as wanted
    return [condition for part in found for condition in part]


def _worse_slices(card: ScoreCard, live: ScoreCard | None) -> tuple[str, ...]:
    """The slices that are worse than the base's, or than those of the version in service where they compare."""
    found = []
    for path, where, part in sides(card):
        for item in _judged_slices(path, where, part):
            try:
                other = in_service(item, card, live) if live is not None else None
            except NoAnswer:
                other = None
            if item.measure.shown == "worse" or _below(item.measure, other):
                found.append(item.slice)
    return tuple(found)


def _judged_slices(path: str, where: str, part: Part) -> list[Item]:
    """The slices by the part's main measure."""
    sliced = {
        column: {value: measures for value, measures in values.items() if part.main in measures}
        for column, values in part.slices.items()
    }
    return list(slices_of_part(path, where, part.model_copy(update={"slices": sliced}), part.main))


def _below(m: Comparison, other: Comparison | None) -> bool:
    """Whether the whole interval of the adapter's value lies on the worse side of the other's value."""
    if other is None:
        return False
    return m.adapter.high < other.adapter.value if m.better == "higher" else m.adapter.low > other.adapter.value


def _parts(tree: Node) -> tuple[Node, ...]:
    return tree.parts if isinstance(tree, And) else (tree,)


def _plain(value: float | str | None) -> float | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _printable(text: str) -> str:
    """The text without the characters that XML 1.0 forbids (section 2.2)."""
    return re.sub(r"[^\t\n\r -\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]", "?", text)
