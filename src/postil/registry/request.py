"""A request to move an alias, answered by its policy: the acts that follow, a refusal or an override among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from postil.errors import RegistryError
from postil.judging.card.model import ScoreCard
from postil.judging.gate.gate import GateResult
from postil.registry.policy import Policy, ask, refused
from postil.registry.state import Act, State


@dataclass(frozen=True, slots=True)
class Asked:
    """What the policy said, and the acts that are to be committed: none where the alias points there already."""

    acts: tuple[Act, ...]
    result: GateResult
    refused: bool = False
    overridden: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """An alias that is to move to a version, by its stored card.

    override: a reason to do it in spite of a refusal, by those whom the policy lets; new_base: bind the name to the
    version's base.
    """

    action: Any  # publish, promote or rollback
    name: str
    alias: str
    version: str
    base: dict[str, str]
    card: ScoreCard
    actor: str
    override: str | None = None
    new_base: bool = False

    def __post_init__(self) -> None:
        if self.override is not None and not self.override.strip():
            raise RegistryError('an override needs a reason, which is logged: --override "why"')

    def asked(self, state: State, live: ScoreCard | None) -> Asked:
        """The policy's answer in this state of the name; `live` is the card of the version in service."""
        policy = state.policy(self.alias)
        result = ask(policy, self.card, live)
        acts = []
        foreign = self._foreign(policy, state)
        if foreign:
            return self._refused(refused(result, "base", foreign), state)
        source = self.base.get("source", "")
        if not policy.base and state.base not in ("", source):
            acts.append(self._act("rebind", state, base=source, reason=f"{self.action} with --new-base"))
        if not result.passed:
            if self.override is None:
                return self._refused(result, state)
            if not policy.may_override(self.actor):
                reason = (
                    f"{self.actor} may not override the policy of {self.name}@{self.alias}; "
                    f"those who may: {policy.told['overriders']}"
                )
                return self._refused(refused(result, "override", reason), state)
            acts.append(self._act("override", state, result, reason=self.override))
        if state.live.get(self.alias) == self.version and (self.action != "publish" or self.version in state.served):
            return Asked((), result)
        acts.append(self._act(self.action, state, result, scope=self.card.scope, base=source))
        return Asked(tuple(acts), result, overridden=not result.passed)

    def _foreign(self, policy: Policy, state: State) -> str:
        """Why the version's base is not the one that the alias is bound to; empty where it is."""
        source, bound = self.base.get("source", ""), policy.base or state.base
        if not bound or source == bound or (self.new_base and not policy.base):
            return ""
        mend = "publish it under another name, or bind the name to its base with --new-base"
        if policy.base:
            mend = f"change that with `postil registry policy {self.name} --alias {self.alias} --base`"
        return f"{self.name}@{self.alias} is bound to the base {bound} and this version belongs to {source}; {mend}"

    def _refused(self, result: GateResult, state: State) -> Asked:
        return Asked((self._act("refuse", state, result, scope=self.card.scope),), result, refused=True)

    def _act(self, action: Any, state: State, result: GateResult | None = None, **more: Any) -> Act:
        if result is not None:
            more |= {"gate": result.expression, "sentence": result.sentence, "result": result.as_dict()}
        return Act(action=action, alias=self.alias, version=self.version, before=state.live.get(self.alias), **more)
