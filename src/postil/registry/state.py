"""What was done to a name, event by event, and the state that the events come to: one fold for every catalog."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from pydantic import Field

from postil.errors import PostilError, RegistryError
from postil.registry.policy import Policy
from postil.settings import Settings

Action = Literal["publish", "promote", "rollback", "refuse", "override", "rebind", "policy", "retire", "delete"]
MOVES = ("publish", "promote", "rollback")
DEPTH = 256  # versions before its own that an alias remembers; older ones are still promoted by their digest


class Act(Settings):
    """What is to be done to a name.

    publish, promote, rollback: `alias` moves from version `before` to `version`. refuse: it was asked to and did not.
    override: a refusal that was set aside, for a reason; the move follows. rebind: the name now belongs to `base`.
    policy: `alias` asks `policy` from here on. retire: `version` is served no more. delete: `alias` is gone.
    gate: the expression asked, sentence: its answer, result: all of it. scope, base: of the version.
    """

    where: ClassVar[str] = "log of the registry"
    error: ClassVar[type[PostilError]] = RegistryError

    action: Action
    alias: str = ""
    version: str = ""
    before: str | None = None
    gate: str = ""
    sentence: str = ""
    reason: str = ""
    scope: str = ""
    base: str = ""
    policy: Policy | None = None
    result: dict[str, Any] | None = None


class Event(Act):
    """An act that was done: its number (1, 2, … within one name), by whom and when (UTC), told nowhere else."""

    number: int
    who: str = ""
    when: str = ""


class Alias(Settings):
    """Where an alias points (None: deleted), and the versions before, the last one nearest. revision: the number of
    the event that moved it, which no two moves share, so that A → B → A is told from A."""

    where: ClassVar[str] = "alias"
    error: ClassVar[type[PostilError]] = RegistryError

    version: str | None
    revision: int
    before: tuple[str, ...] = ()


class Publication(Settings):
    """A version under a name: the event that published it first, the base's source, the scope of its card."""

    where: ClassVar[str] = "publication"
    error: ClassVar[type[PostilError]] = RegistryError

    number: int
    base: str = ""
    scope: str = ""


class State(Settings):
    """A name as it stands. revision: the number of its last event, 0 where nothing was done yet. base: the source of
    the base that the name is bound to."""

    where: ClassVar[str] = "state of a name"
    error: ClassVar[type[PostilError]] = RegistryError

    revision: int = 0
    base: str = ""
    aliases: dict[str, Alias] = Field(default_factory=dict)
    policies: dict[str, Policy] = Field(default_factory=dict)
    published: dict[str, Publication] = Field(default_factory=dict)
    retired: dict[str, int] = Field(default_factory=dict)

    @property
    def live(self) -> dict[str, str]:
        """Alias → version, of the aliases that are there."""
        return {name: alias.version for name, alias in sorted(self.aliases.items()) if alias.version}

    @property
    def served(self) -> list[str]:
        """The versions that may be served, the first published one first."""
        known = sorted(self.published, key=lambda digest: self.published[digest].number)
        return [digest for digest in known if digest not in self.retired]

    def policy(self, alias: str) -> Policy:
        """What the alias asks: its own policy, or the default one."""
        return self.policies.get(alias, Policy())

    def stack(self, alias: str) -> list[str]:
        """The versions that the alias went through and still has before it, its own last."""
        found = self.aliases.get(alias)
        return [*found.before, found.version] if found is not None and found.version else []


def applied(state: State, events: Iterable[Event]) -> State:
    """The state after the events."""
    for event in events:
        state = State(**(dict(state) | {"revision": event.number} | _changes(state, event)))
    return state


def _changes(state: State, event: Event) -> dict[str, Any]:
    """The fields of the state that one event changes."""
    if event.action in MOVES:
        changes: dict[str, Any] = {"aliases": state.aliases | {event.alias: _moved(state, event)}}
        if event.action == "publish":
            first = Publication(number=event.number, base=event.base, scope=event.scope)
            changes["published"] = {event.version: first} | state.published
            changes["retired"] = {digest: at for digest, at in state.retired.items() if digest != event.version}
            changes["base"] = state.base or event.base
        return changes
    if event.action == "delete":
        return {"aliases": state.aliases | {event.alias: Alias(version=None, revision=event.number)}}
    if event.action == "retire":
        return {"retired": state.retired | {event.version: event.number}}
    if event.action == "policy" and event.policy is not None:
        return {"policies": state.policies | {event.alias: event.policy}}
    if event.action == "rebind":
        return {"base": event.base}
    return {}


def _moved(state: State, event: Event) -> Alias:
    stack = state.stack(event.alias)
    if event.action == "rollback":
        while stack and stack[-1] != event.version:
            stack.pop()
    if not stack or stack[-1] != event.version:
        stack.append(event.version)
    return Alias(version=event.version, revision=event.number, before=tuple(stack[-DEPTH - 1 : -1]))
