"""The registry: publish, promote and roll back by an alias's policy; what a name means, its bytes verified."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from postil.errors import Corrupt, NotFound, RegistryConflict, RegistryError, listed, nearest
from postil.judging.card.model import ScoreCard
from postil.judging.gate.expression import parse
from postil.judging.gate.gate import unjudged
from postil.registry.cache import materialise, unchanged
from postil.registry.candidate import candidate, refusal
from postil.registry.directory import check_alias, check_name
from postil.registry.finding import LIVE, Version, aliases_of, digest_of, known, parsed, record_of, version_of
from postil.registry.log import who
from postil.registry.opening import opened
from postil.registry.policy import LATEST, Policy
from postil.registry.ports import Blobs, Catalog
from postil.registry.request import Asked, Request
from postil.registry.state import Act, Event, State
from postil.registry.version import MEND, Manifest, Record, short

if TYPE_CHECKING:
    from postil.adapter import Adapter

GRACE = 7.0  # days that what is in no use is kept
TRIES = 20  # at a name that others write to as well


class Registry:
    """Published adapters in a directory. Every method raises a RegistryError for a name, version or byte that is not
    what it should be; nothing is made before something is published or a policy set.

    actor: who is written down as the one who did it, and whom a policy may let override it; the user of the system
    where none is given. blobs: another store for the bytes. cache: where versions are fetched to.
    """

    def __init__(
        self, place: str | Path | Catalog, blobs: Blobs | None = None, *,
        actor: str = "", cache: str | Path | None = None,
    ) -> None:  # fmt: skip
        self.catalog, self.blobs = opened(place, blobs)
        self.actor = actor or who()
        self.cache = None if cache is None else Path(cache)

    # -- moving -----------------------------------------------------------------------------------------

    def publish(
        self, adapter: Adapter | str | Path, name: str, card: ScoreCard | None = None, *,
        alias: str = LIVE, override: str | None = None, new_base: bool = False,
    ) -> Version:  # fmt: skip
        """Ask the policy of `alias` of `name`, keep the version and point the alias at it.

        adapter: in memory, or its directory; card: its score card where it does not hold one. The version in service,
        `live` in the policy's expression, is what name@live points at. Equal bytes are one version. override: a
        reason to publish what the policy refuses, which is logged; new_base: bind the name to the adapter's base
        where it was bound to another. Raises Refused where the policy refuses (the version is then kept where no
        name reaches it, until `collect`), RegistryConflict where another process moved the alias meanwhile.
        """
        check_name(name)
        check_alias(alias)
        self.catalog.check_own()
        with candidate(adapter, card) as found:
            first = self.catalog.state(name)
            request = Request("publish", name, alias, found.digest, found.manifest.base, found.card, self.actor,
                              override=override, new_base=new_base)  # fmt: skip
            request.asked(first, self._live_card(first, found.digest))  # a question that cannot be asked ends here
            self.catalog.make()

            files = found.manifest.files.items()
            written = [self.blobs.put(digest, found.directory / file) for file, digest in files]  # under no lock
            new = any(written) or not self._kept(found.digest)

            def again() -> None:
                for file, digest in files:
                    if not self.blobs.has(digest):  # collected, as it was in no use yet
                        self.blobs.put(digest, found.directory / file)

            asked = self._do(request, first, found.record, again)
        return self._told(name, found.digest, asked, new=new)

    def promote(
        self, name: str, version: str, alias: str = LIVE, *, override: str | None = None, new_base: bool = False
    ) -> Version:
        """Point an alias at a published version, named by the beginning of its digest (or by another alias), if the
        alias's policy lets the stored card through. Raises and logs as publish does."""
        check_alias(alias)
        state = known(self.catalog, name)
        return self._move("promote", name, alias, digest_of(self.catalog, name, version), state, override, new_base)

    def rollback(
        self, name: str, alias: str = LIVE, *, override: str | None = None, new_base: bool = False
    ) -> Version:
        """Point an alias at the version that it had before, once more goes further back; versions that were retired
        are passed over. Its policy is asked as it would have been then: `live` is the version before that one."""
        check_alias(alias)
        state = known(self.catalog, name)
        digest_of(self.catalog, name, alias)
        stack = state.stack(alias)
        before = [digest for digest in stack[:-1] if digest not in {*state.retired, state.live.get(alias)}]
        if not before:
            raise NotFound(
                f"{name}@{alias} has no version before {short(state.live.get(alias))}; promote another with "
                "`postil registry promote`"
            )
        return self._move("rollback", name, alias, before[-1], state, override, new_base)

    def _move(
        self, action: str, name: str, alias: str, digest: str, state: State, override: str | None, new_base: bool
    ) -> Version:
        record = record_of(self.catalog, digest)
        card = record.score_card
        if card is None:
            raise refusal(unjudged(f"version {short(digest)} holds no score card; judge its adapter and publish it"))
        for fault in self._faults(record):
            raise Corrupt(fault)
        request = Request(action, name, alias, digest, record.manifest.base, card, self.actor,
                          override=override, new_base=new_base)  # fmt: skip
        return self._told(name, digest, self._do(request, state, record))

    def _do(
        self, request: Request, first: State, record: Record, again: Callable[[], object] = lambda: None
    ) -> Asked:
        """Commit what the policy says, asked again wherever the name was written to meanwhile; again: what to do
        then. Raises Refused once the refusal is logged."""
        asked: list[Asked] = []
        below = request.version if request.action == "rollback" and request.alias == LIVE else None

        def acts(state: State) -> Sequence[Act]:
            if asked:
                again()
            asked.append(request.asked(state, self._live_card(state, request.version, below)))
            if asked[-1].acts and not asked[-1].refused and state.aliases.get(request.alias) != before:
                now, then = state.live.get(request.alias), first.live.get(request.alias)
                raise RegistryConflict(
                    f"{request.name}@{request.alias} points at {short(now)} and no longer at {short(then)}: another "
                    "process moved it meanwhile; look at it with `postil registry show` and run this again"
                )
            return asked[-1].acts

        before = first.aliases.get(request.alias)
        self._commit(request.name, first, acts, record)
        if asked[-1].refused:
            raise refusal(asked[-1].result)
        return asked[-1]

    def _commit(
        self, name: str, first: State, acts: Callable[[State], Sequence[Act]], record: Record | None = None
    ) -> None:
        """Commit the acts that follow from the state, and anew from the next one where others wrote to the name."""
        state = first
        for left in reversed(range(TRIES)):
            wanted = acts(state)
            if not wanted and (record is None or self._kept(record.manifest.digest)):
                return
            try:
                self.catalog.commit(name, state.revision, wanted, self.actor, record)
                return
            except RegistryConflict:
                if not left:
                    raise
                state = self.catalog.state(name)

    def _live_card(self, state: State, candidate: str, below: str | None = None) -> ScoreCard | None:
        """The card of the version that name@live points at; of the one before, where that is the candidate, and of
        the one before `below`, where the alias goes back to that."""
        stack = state.stack(LIVE)
        while below in stack:
            stack.pop()
        for digest in reversed(stack):
            record = self.catalog.record(digest) if digest != candidate else None
            if record is not None:
                return record.score_card
        return None

    # -- keeping ----------------------------------------------------------------------------------------

    def policy(self, name: str, alias: str = LIVE) -> Policy:
        """What an alias asks; the default policy where none was set."""
        check_name(name)
        check_alias(alias)
        self.catalog.check_own()
        return self.catalog.state(name).policy(alias)

    def set_policy(self, name: str, policy: Policy, alias: str = LIVE, *, reason: str = "") -> Policy:
        """Let an alias ask this from here on, also before anything is published; where it points is left alone.

        Raises JudgeError for an expression that cannot be read.
        """
        check_name(name)
        check_alias(alias)
        if policy.gate != LATEST:
            parse(policy.gate)
        self.catalog.check_own()
        act = Act(action="policy", alias=alias, policy=policy, reason=reason)
        first = self.catalog.state(name)

        def acts(state: State) -> list[Act]:
            if state.policy(alias) not in (first.policy(alias), policy):
                raise RegistryConflict(
                    f"another process set the policy of {name}@{alias} meanwhile; look at it with `postil registry "
                    "policy` and run this again"
                )
            return [act] if state.policies.get(alias) != policy else []

        self._commit(name, first, acts)
        return policy

    def retire(self, name: str, version: str, reason: str = "") -> str:
        """Serve a version no more under this name: no alias may go to it, and `collect` removes it in the end; its
        events stay. Publishing it again takes that back. Returns its digest."""
        state = known(self.catalog, name)
        digest = digest_of(self.catalog, name, version)
        act = Act(action="retire", version=digest, reason=reason)

        def acts(state: State) -> list[Act]:
            at = [alias for alias, points_at in state.live.items() if points_at == digest]
            if at:
                raise RegistryError(
                    f"{name}@{at[0]} points at {short(digest)}; move it first, with `postil registry rollback` or "
                    "`promote`, or take the alias away with `postil registry delete-alias`"
                )
            return [act]

        self._commit(name, state, acts)
        return digest

    def delete_alias(self, name: str, alias: str, reason: str = "") -> None:
        """Take an alias away; its versions, its policy and its events stay."""
        state = known(self.catalog, name)
        if alias not in state.live:
            raise NotFound(f"{name} has no alias {alias!r}{nearest(alias, state.live)}; it has {listed(state.live)}")
        act = Act(action="delete", alias=alias, before=state.live[alias], reason=reason)
        before = state.aliases[alias]

        def acts(state: State) -> list[Act]:
            if state.aliases[alias] != before:
                raise RegistryConflict(f"{name}@{alias} was moved meanwhile; look at it and run this again")
            return [act]

        self._commit(name, state, acts)

    def unpublish(self, name: str, reason: str = "") -> None:
        """Take a name out of service: every alias deleted, every version retired, in one step; its events, its
        policies and the base that it is bound to stay."""

        def acts(state: State) -> list[Act]:
            gone = [Act(action="delete", alias=alias, before=at, reason=reason) for alias, at in state.live.items()]
            return gone + [Act(action="retire", version=digest, reason=reason) for digest in state.served]

        self._commit(name, known(self.catalog, name), acts)

    def collect(self, grace: float = GRACE, *, dry: bool = False) -> tuple[list[str], int]:
        """Remove what no name has served for `grace` days: versions that were refused, retired or never committed,
        and their bytes. Returns the versions and the bytes freed; dry: without removing anything."""
        self.catalog.check()
        before = time.time() - grace * 86400 if grace > 0 else float("inf")
        return self.catalog.collect(before, partial(self.blobs.sweep, before=before, dry=dry), dry)

    def verify(self, name: str | None = None) -> list[str]:
        """Read every byte of what the names (or one of them) serve; the sentences about what was changed."""
        self.catalog.check()
        found: dict[str, str] = {}
        for one in [name] if name is not None else self.catalog.names():
            found |= dict.fromkeys(known(self.catalog, one).served, one)
        faults = []
        for digest, one in found.items():
            try:
                record = record_of(self.catalog, digest)
            except Corrupt as problem:
                faults.append(f"{one}: {problem}")
                continue
            faults += [f"{one}: {fault}" for fault in self._faults(record)]
        return faults

    # -- finding ----------------------------------------------------------------------------------------

    def resolve(self, wanted: str) -> Path:
        """The adapter directory that `name`, `name@alias` or `name@version` means, in the user's cache: every byte
        was verified when it was fetched, and nothing was changed since."""
        return materialise(self.blobs, self._manifest(wanted), self.cache)

    def load(self, wanted: str) -> Adapter:
        """The adapter that `name`, `name@alias` or `name@version` means, of the bytes that were verified."""
        from postil.adapter.peft_files import load_adapter

        manifest = self._manifest(wanted)
        place = materialise(self.blobs, manifest, self.cache)
        adapter = load_adapter(place)
        if not unchanged(place, manifest):
            raise Corrupt(f"{place} was changed while it was read; run this again")
        return adapter

    def version(self, wanted: str) -> Version:
        """What is known of a version, without reading its bytes."""
        name, which = parsed(wanted)
        return version_of(self.catalog, name, digest_of(self.catalog, name, which))

    def names(self) -> list[str]:
        """The names that something was done to."""
        self.catalog.check()
        return self.catalog.names()

    def state(self, name: str) -> State:
        """The name as it stands: its aliases, its policies, its versions and the base that it is bound to."""
        return known(self.catalog, name)

    def versions(self, name: str) -> dict[str, tuple[str, ...]]:
        """Every version (digest) served under a name, the first one first, and the aliases that point at it."""
        state = known(self.catalog, name)
        return {digest: aliases_of(state, digest) for digest in state.served}

    def history(self, name: str, since: int = 0, limit: int | None = None) -> list[Event]:
        """What was done to a name after its event `since`, in order; refusals too."""
        known(self.catalog, name)
        return self.catalog.events(name, since, limit)

    def _manifest(self, wanted: str) -> Manifest:
        name, which = parsed(wanted)
        return record_of(self.catalog, digest_of(self.catalog, name, which)).manifest

    def _faults(self, record: Record) -> Iterator[str]:
        """What was changed of a version's files, each byte of which is read, in sentences."""
        for file, digest in record.manifest.files.items():
            try:
                self.blobs.verify(digest)
            except Corrupt as problem:
                yield f"{problem}: it is {file} of version {short(record.manifest.digest)}; {MEND}"

    def _kept(self, digest: str) -> bool:
        try:
            return self.catalog.record(digest) is not None
        except Corrupt:
            return False

    def _told(self, name: str, digest: str, asked: Asked, new: bool = False) -> Version:
        version = version_of(self.catalog, name, digest)
        return replace(version, new=new, moved=bool(asked.acts), gate=asked.result, overridden=asked.overridden)


def publish(
    adapter: Adapter | str | Path, name: str, card: ScoreCard | None = None, *,
    registry: Registry | str | Path, override: str | None = None,
) -> Version:  # fmt: skip
    """Publish an adapter as `name` in a registry, if the policy of name@live lets it; see Registry.publish."""
    place = registry if isinstance(registry, Registry) else Registry(registry)
    return place.publish(adapter, name, card, override=override)


def resolve_adapter(given: str, registry: str | Path | None) -> tuple[str, Path] | None:
    """The name and directory of an adapter given as `name@alias`, `name@version` or, with a registry, `name`.

    None where `given` is a directory, or is not meant for the registry at all. Raises RegistryError as
    Registry.resolve does, and where a registry is needed and none was named.
    """
    separators = {os.sep, os.altsep or os.sep, "/"}
    if os.path.exists(given) or any(mark in given for mark in separators) or not ("@" in given or registry):
        return None
    name, _ = parsed(given)
    if not registry:
        raise RegistryError(
            f"{given!r} is no directory; if it is a published name, add --registry DIR or set POSTIL_REGISTRY"
        )
    return name, Registry(registry).resolve(given)
