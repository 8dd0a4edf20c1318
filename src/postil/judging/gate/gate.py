"""The gate: a score card held against an expression; passed, or refused with the condition that broke."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from postil.errors import GateError, listed
from postil.judging.card.model import Comparison, ScoreCard
from postil.judging.gate.conditions import Condition, NoAnswer, answer
from postil.judging.gate.expression import And, Compare, Judged, Leaf, Node, Not, leaves, parse

DEFAULT = "target is better and general.nats < base + 0.05"  # over a card with slices also: EACH
EACH = "slices is not worse"


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

    Where no version is in service the base is, so `live` then means the base. A card without general data is
    refused whatever the expression says, as is one whose measures named here are missing, not finite, or (for
    `live`) taken on other rows. DEFAULT asks EACH too where the card has slices. Raises JudgeError for an
    expression that cannot be read or names a measure that no card has.
    """
    tree = parse(expression)
    if expression == DEFAULT and card.target is not None and card.target.slices:
        tree = And((*_parts(tree), parse(EACH)))
    answers: dict[Leaf, Condition] = {}
    blind = []
    for leaf in leaves(tree):
        try:
            answers[leaf] = answer(leaf, card, live)
        except NoAnswer as reason:
            answers[leaf] = Condition(str(leaf), None, None, False, str(reason))
            blind.append(answers[leaf])
    general = _without_general(card)
    culprits = list(dict.fromkeys(general or blind or _culprits(tree, answers, wanted=True)))
    conditions = tuple(replace(c, broke=c in culprits) for c in (*general, *answers.values()))
    reasons = [c.sentence + (" (the gate wants it otherwise)" if c.passed else "") for c in culprits]
    worse = _worse_slices(card, live)
    unnamed = [name for name in worse if not any(name in c.slices for c in culprits)]
    sentence = f"refused: {'; '.join(reasons)}" + (f"; slices that got worse: {listed(unnamed)}" if unnamed else "")
    if not culprits:
        sentence = f"passed: {'; '.join(c.sentence for c in answers.values())}"
    return GateResult(not culprits, str(tree), conditions, sentence, worse)


def enforce(card: ScoreCard, expression: str = DEFAULT, live: ScoreCard | None = None) -> GateResult:
    """As check; raises GateError (exit code 3), with the result as its `result`, where the gate refuses."""
    result = check(card, expression, live)
    if not result.passed:
        raise refusal(result)
    return result


def refusal(result: GateResult) -> GateError:
    """The error that a refused result is raised as."""
    error = GateError(result.sentence)
    error.result = result
    return error


def unjudged(reason: str) -> GateResult:
    """The result for an adapter that has no score card, or none of its own."""
    return GateResult(False, "", (Condition("score card", None, None, False, reason, True),), f"refused: {reason}")


def _without_general(card: ScoreCard) -> list[Condition]:
    if any(part.data.rows and part.measures for part in card.general.values()):
        return []
    sentence = (
        "the card holds no general data, so nobody has looked for damage; "
        "judge the adapter again without --general none, which leaves it out"
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
    if card.target is None:
        return ()
    found = []
    theirs = live.target if live is not None else None
    comparable = theirs is not None and theirs.data.sha256 == card.target.data.sha256
    for column, values in card.target.slices.items():
        for value, measures in values.items():
            m = measures.get(card.target.main)
            other = theirs.slices.get(column, {}).get(value, {}) if theirs is not None and comparable else {}
            if m is not None and (m.verdict == "worse" or _below(m, other.get(card.target.main))):
                found.append(f"{column}={value}")
    return tuple(found)


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
