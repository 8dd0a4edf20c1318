"""The registry: publish through the gate, promote, roll back, and find what a name means, its bytes verified."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from postil.errors import RegistryError, listed, nearest
from postil.judging.card.file import KEY, read_card
from postil.judging.card.model import ScoreCard
from postil.judging.gate.gate import DEFAULT, GateResult, check, refusal, unjudged
from postil.registry.log import Event, stack
from postil.registry.store import DirectoryStore, check_alias, check_name
from postil.registry.version import KEPT, SHORT, Manifest, digests_of

if TYPE_CHECKING:
    from postil.adapter import Adapter

LIVE = "live"  # the alias that a bare name means
REFUSAL = "refusal.json"


@dataclass(frozen=True, slots=True)
class Version:
    """A published version: its digest, where it lies, the base it belongs to, the aliases that point at it.

    new: False where equal bytes had been published before; moved: whether publishing moved the alias; gate: what
    the gate said when it was published, known to the call that published it.
    """

    name: str
    digest: str
    path: Path
    base: dict[str, str]
    aliases: tuple[str, ...]
    new: bool = False
    moved: bool = False
    gate: GateResult | None = None

    @property
    def short(self) -> str:
        """The first digits of the digest, as they are shown."""
        return self.digest[:SHORT]


class Registry:
    """Published adapters on a directory. Every method raises RegistryError for a name, version or byte that is
    not what it should be; nothing is made before the first `publish`."""

    def __init__(self, place: str | Path) -> None:
        self.store = DirectoryStore(place)

    def publish(
        self, adapter: Adapter | str | Path, name: str, card: ScoreCard | None = None, *,
        gate: str = DEFAULT, alias: str = LIVE,
    ) -> Version:  # fmt: skip
        """Ask the gate, keep the version and point `alias` of `name` at it.

        adapter: in memory, or its directory; card: its score card where it does not hold one. The version in
        service, `live` in the expression, is what name@live points at. Equal bytes are one version: published
        again they change nothing. Raises GateError where the gate refuses (the version is then kept on the shelf
        `refused`, which no alias reaches), RegistryError where another process moved the alias meanwhile.
        """
        check_name(name)
        check_alias(alias)
        self.store.check_own()
        with _directory(adapter, card) as directory:
            files = digests_of(directory)  # before they are read: what changes from here on is noticed
            judged, base = _judged(directory, adapter)
            manifest = Manifest(base=base, files=files)
            digest = manifest.digest
            before = self.store.aliases(name).get(alias)
            result = check(judged, gate, self._card_in_service(name, digest))
            if not result.passed:
                if digest not in self._published(name):
                    self.store.put("refused", manifest, directory, {REFUSAL: result.as_dict()})
                self.store.record(name, "refuse", alias, digest, gate=result.expression, sentence=result.sentence)
                raise refusal(result)
            new = self.store.put("versions", manifest, directory)
        self.store.swap(
            name, alias, before, digest, action="publish", gate=result.expression, sentence=result.sentence
        )
        self.store.drop("refused", digest)
        return replace(self._version(name, digest), new=new, moved=before != digest, gate=result)

    def promote(self, name: str, version: str, alias: str = LIVE) -> Version:
        """Point an alias at a published version, named by the beginning of its digest (or by another alias)."""
        check_alias(alias)
        digest = self._digest(name, version)
        before = self.store.aliases(name).get(alias)
        self.store.get("versions", digest)
        self.store.swap(name, alias, before, digest, action="promote")
        return replace(self._version(name, digest), moved=before != digest)

    def rollback(self, name: str, alias: str = LIVE) -> Version:
        """Point an alias at the version that it had before, by the log; once more goes further back."""
        check_alias(alias)
        self._digest(name, alias)
        before = stack(self.store.log(name), alias)
        if len(before) < 2:
            raise RegistryError(
                f"{name}@{alias} has no version before {before[0][:SHORT]}; promote another with `postil promote`"
            )
        self.store.get("versions", before[-2])
        self.store.swap(name, alias, before[-1], before[-2], action="rollback")
        return replace(self._version(name, before[-2]), moved=True)

    def resolve(self, wanted: str) -> Path:
        """The adapter directory that `name`, `name@alias` or `name@version` means, every byte verified."""
        return self.version(wanted).path

    def load(self, wanted: str) -> Adapter:
        """The adapter that `name`, `name@alias` or `name@version` means."""
        from postil.adapter.peft_files import load_adapter

        return load_adapter(self.resolve(wanted))

    def version(self, wanted: str) -> Version:
        """As resolve, with what is known of the version."""
        name, _, which = wanted.partition("@")
        return self._version(name, self._digest(name, which or LIVE))

    def names(self) -> list[str]:
        """The published names."""
        self.store.check()
        return self.store.names()

    def versions(self, name: str) -> dict[str, tuple[str, ...]]:
        """Every version (digest) published under a name, the first one first, and the aliases that point at it."""
        self._known(name)
        aliases = self.store.aliases(name)
        return {
            digest: tuple(alias for alias, points_at in aliases.items() if points_at == digest)
            for digest in self._published(name)
        }

    def history(self, name: str) -> list[Event]:
        """Everything that was done to a name, in order; refusals too."""
        self._known(name)
        return self.store.log(name)

    def _known(self, name: str) -> None:
        self.store.check()
        names = self.store.names()
        if name not in names:
            raise RegistryError(f"nothing is published as {name!r}{nearest(name, names)}; known: {listed(names)}")

    def _published(self, name: str) -> list[str]:
        return list(dict.fromkeys(event.version for event in self.store.log(name) if event.action != "refuse"))

    def _version(self, name: str, digest: str) -> Version:
        path, manifest = self.store.get("versions", digest)
        aliases = tuple(alias for alias, points_at in self.store.aliases(name).items() if points_at == digest)
        return Version(name, digest, path, manifest.base, aliases)

    def _digest(self, name: str, which: str) -> str:
        """The full digest that an alias or the beginning of a digest means."""
        self._known(name)
        aliases = self.store.aliases(name)
        if which in aliases:
            return aliases[which]
        published = self._published(name)
        found = [digest for digest in published if digest.startswith(which)]
        if len(found) == 1 and re.fullmatch(r"[0-9a-f]{4,64}", which):
            return found[0]
        if len(found) > 1:
            raise RegistryError(f"{name}@{which} could be {listed(d[:SHORT] for d in found)}; give more digits")
        for event in reversed(self.store.log(name)):
            if event.action == "refuse" and event.version.startswith(which):
                raise RegistryError(
                    f"{name}@{which} was not published ({event.sentence}); only a gate that lets it through does that"
                )
        if not published:
            raise RegistryError(
                f"nothing is in service as {name}: the gate refused what was published; publish an adapter that "
                f"passes: postil publish DIR --as {name}"
            )
        raise RegistryError(
            f"{name}@{which} is neither an alias nor a version{nearest(which, aliases)}; "
            f"aliases: {listed(aliases)}; versions: {listed(digest[:SHORT] for digest in published)}"
        )

    def _card_in_service(self, name: str, candidate: str) -> ScoreCard | None:
        """The card of the version that name@live points at; of the one before, where that is the candidate."""
        before = [digest for digest in stack(self.store.log(name), LIVE) if digest != candidate]
        return read_card(self.store.get("versions", before[-1])[0]) if before else None


def publish(
    adapter: Adapter | str | Path, name: str, card: ScoreCard | None = None, *,
    registry: Registry | str | Path, gate: str = DEFAULT,
) -> Version:  # fmt: skip
    """Publish an adapter as `name` in a registry, if the gate lets it through; see Registry.publish."""
    place = registry if isinstance(registry, Registry) else Registry(registry)
    return place.publish(adapter, name, card, gate=gate)


def resolve_adapter(given: str, registry: str | Path | None) -> tuple[str, Path] | None:
    """The name and directory of an adapter given as `name@alias`, `name@version` or, with a registry, `name`.

    None where `given` is a directory, or is not meant for the registry at all. Raises RegistryError as
    Registry.resolve does, and where a registry is needed and none was named.
    """
    name, mark, _ = given.partition("@")
    if os.path.exists(given) or os.sep in given or not (mark or registry is not None):
        return None
    if registry is None:
        raise RegistryError(
            f"{given!r} is no directory; if it is a published name, add --registry DIR or set POSTIL_REGISTRY"
        )
    return name, Registry(registry).resolve(given)


def _judged(directory: Path, adapter: Adapter | str | Path) -> tuple[ScoreCard, dict[str, str]]:
    """The score card of an adapter that loads, and its base. Raises GateError where there is no card, or one
    of other bytes or of another base."""
    from postil.adapter.identity import adapter_sha256
    from postil.adapter.peft_files import load_adapter

    shown = adapter if isinstance(adapter, str | Path) else "this adapter"
    where = adapter if isinstance(adapter, str | Path) else "ADAPTER"
    loaded = load_adapter(directory)
    base = loaded.base_name or "BASE"
    mend = f"judge it first: postil judge {where} --base {base} --target FILE"
    card = read_card(directory)
    if card is None:
        raise refusal(unjudged(f"{shown} holds no score card, and what was not judged is not let through; {mend}"))
    if card.adapter_sha256 != adapter_sha256(directory):
        raise refusal(unjudged(f"the score card of {shown} was made for other bytes than its files hold; {mend}"))
    if loaded.base and loaded.base.get("source") != card.base.get("source"):
        raise refusal(
            unjudged(f"{shown} belongs to the base {loaded.base.get('source')} and was judged on another; {mend}")
        )
    return card, loaded.base or card.base


@contextmanager
def _directory(adapter: Adapter | str | Path, card: ScoreCard | None) -> Iterator[Path]:
    """The adapter's directory, as it is or, in memory or with a card to add, a copy that is gone afterwards."""
    if isinstance(adapter, str | Path) and card is None:
        yield Path(adapter)
        return
    from postil.adapter.identity import update_card
    from postil.adapter.peft_files import read_config, save_adapter

    with tempfile.TemporaryDirectory(prefix="postil-publish-") as place:
        copy = Path(place) / "adapter"
        if isinstance(adapter, str | Path):
            read_config(Path(adapter))
            copy.mkdir()
            for name in KEPT:
                if (Path(adapter) / name).is_file():
                    shutil.copyfile(Path(adapter) / name, copy / name)
        else:
            save_adapter(adapter, copy)
        if card is not None:
            update_card(copy, **{KEY: card.model_dump(mode="json")})
        yield copy
