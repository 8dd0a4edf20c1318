"""The policy of an alias: what a version must show before the alias may move to it, and who may override it."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from postil.errors import PostilError, RegistryError, listed
from postil.judging.card.model import ScoreCard
from postil.judging.gate.gate import DEFAULT, GateResult, check
from postil.judging.gate.items import Condition
from postil.settings import Settings

LATEST = "default"  # stored in place of an expression: the default gate of the postil that asks


class Policy(Settings):
    """What one alias of one name asks.

    gate: an expression, or "default". scope: the widest notes alone ("assistant"), or also those made for their own
    task alone ("task"). base: the source of the base that versions must belong to; empty: the one that the name is
    bound to. overriders: who may override a refusal; None: whoever may write to the registry.
    """

    where: ClassVar[str] = "policy"
    error: ClassVar[type[PostilError]] = RegistryError

    gate: str = LATEST
    scope: Literal["assistant", "task"] = "task"
    base: str = ""
    overriders: tuple[str, ...] | None = None

    @property
    def expression(self) -> str:
        """The expression that is asked."""
        return DEFAULT if self.gate == LATEST else self.gate

    @property
    def told(self) -> dict[str, str]:
        """The policy in words, by what each is about."""
        anyone = "whoever may write to the registry"
        return {
            "gate": self.expression + (" (the default)" if self.gate == LATEST else ""),
            "scope": "assistant alone" if self.scope == "assistant" else "assistant or task",
            "base": self.base or "the one that the name is bound to",
            "overriders": anyone if self.overriders is None else listed(self.overriders),
        }

    def may_override(self, actor: str) -> bool:
        """Whether `actor` may override a refusal."""
        return self.overriders is None or actor in self.overriders


def ask(policy: Policy, card: ScoreCard, live: ScoreCard | None) -> GateResult:
    """Hold a stored card against the policy; `live` is the card of the version in service."""
    result = check(card, policy.expression, live)
    if policy.scope == "assistant" and card.scope == "task":
        reason = (
            "the card's scope is task (the note is for its own task alone) and the policy asks for assistant; judge "
            "it again without --scope task, or let the alias take it: postil registry policy NAME --scope task"
        )
        return refused(result, "scope", reason)
    return result


def refused(result: GateResult, about: str, reason: str) -> GateResult:
    """The result with one more condition that broke."""
    sentence = f"refused: {reason}" if result.passed else f"{result.sentence}; {reason}"
    broke = Condition(about, None, None, False, reason, broke=True)
    return replace(result, passed=False, conditions=(*result.conditions, broke), sentence=sentence)
