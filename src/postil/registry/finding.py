"""What a name, an alias or the first digits of a version mean, and what is known of the version."""

from __future__ import annotations

import re
from dataclasses import dataclass

from postil.errors import Corrupt, NotFound, RegistryError, listed, nearest
from postil.judging.card.model import ScoreCard
from postil.judging.gate.gate import GateResult
from postil.registry.ports import Catalog
from postil.registry.state import State
from postil.registry.version import MEND, SHORT, Record, short

LIVE = "live"  # the alias that a bare name means


@dataclass(frozen=True, slots=True)
class Version:
    """A published version: its digest, the base it belongs to, its files by SHA-256, the aliases that point at it,
    its card and what the card says that it may be asked.

    new: False where equal bytes had been published before; moved: whether the alias moved; gate: what its policy
    said, known to the call that asked it; overridden: whether it moved in spite of that.
    """

    name: str
    digest: str
    base: dict[str, str]
    files: dict[str, str]
    aliases: tuple[str, ...]
    card: ScoreCard | None = None
    new: bool = False
    moved: bool = False
    gate: GateResult | None = None
    overridden: bool = False

    @property
    def short(self) -> str:
        """The first digits of the digest, as they are shown."""
        return self.digest[:SHORT]

    @property
    def scope(self) -> str:
        """What it may be asked: anything ("assistant") or its own task alone ("task")."""
        return self.card.scope if self.card is not None else ""


def parsed(wanted: str) -> tuple[str, str]:
    """The name, and the alias or version, that is wanted. Raises NotFound for an @ with nothing after it."""
    name, mark, which = wanted.partition("@")
    if mark and not which:
        raise NotFound(
            f"{wanted!r} names no alias and no version after the @; write {name} for {name}@{LIVE}, or {name}@ALIAS"
        )
    return name, which or LIVE


def known(catalog: Catalog, name: str) -> State:
    """The state of a name to which something was done. Raises NotFound for any other."""
    catalog.check()
    names = catalog.names()
    if name not in names:
        raise NotFound(f"nothing is published as {name!r}{nearest(name, names)}; known: {listed(names)}")
    return catalog.state(name)


def record_of(catalog: Catalog, digest: str) -> Record:
    """What is kept of a version that a name serves."""
    record = catalog.record(digest)
    if record is None:
        raise Corrupt(f"version {short(digest)} is not there any more; {MEND}")
    return record


def version_of(catalog: Catalog, name: str, digest: str) -> Version:
    """All that is known of a version under a name."""
    record = record_of(catalog, digest)
    aliases = aliases_of(catalog.state(name), digest)
    return Version(name, digest, record.manifest.base, record.manifest.files, aliases, record.score_card)


def aliases_of(state: State, digest: str) -> tuple[str, ...]:
    """The aliases that point at a version."""
    return tuple(alias for alias, points_at in state.live.items() if points_at == digest)


def digest_of(catalog: Catalog, name: str, which: str) -> str:
    """The full digest that an alias or the beginning of a digest means. Raises NotFound with the reason for one that
    was refused or retired."""
    state = known(catalog, name)
    if which in state.live:
        return state.live[which]
    found = [digest for digest in state.served if digest.startswith(which)]
    if len(found) == 1 and re.fullmatch(r"[0-9a-f]{4,64}", which):
        return found[0]
    if len(found) > 1:
        raise RegistryError(f"{name}@{which} could be {listed(d[:SHORT] for d in found)}; give more digits")
    for event in reversed(catalog.events(name)):
        if not event.version or not event.version.startswith(which):
            continue
        if event.version in state.retired:
            raise NotFound(f"{name}@{which} was retired; publish its adapter again to serve it again")
        if event.action == "refuse":
            raise NotFound(
                f"{name}@{which} was not published ({event.sentence}); only a policy that lets it through does that"
            )
    if not state.served:
        why = "its versions were retired" if state.published else "nothing that was published passed its policy"
        raise NotFound(
            f"nothing is in service as {name}: {why}; publish an adapter that passes: postil publish DIR --as {name}"
        )
    raise NotFound(
        f"{name}@{which} is neither an alias nor a version{nearest(which, state.live)}; "
        f"aliases: {listed(state.live)}; versions: {listed(digest[:SHORT] for digest in state.served)}"
    )
