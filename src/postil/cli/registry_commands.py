"""postil publish, list, show, promote, rollback: adapters through the gate into service, and back out of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from postil import console
from postil.errors import GateError, RegistryError

if TYPE_CHECKING:
    from postil.judging.gate.gate import GateResult
    from postil.registry import Registry, Version

Place = Annotated[
    Path | None,
    typer.Option("--registry", envvar="POSTIL_REGISTRY", help="The registry's directory; or set POSTIL_REGISTRY."),
]
Name = Annotated[str, typer.Argument(help="A published name.")]
Alias = Annotated[str, typer.Option(help="The alias to move; a bare name means live.")]


def publish(
    adapter: Annotated[Path, typer.Argument(help="A judged adapter's directory.")],
    name: Annotated[str, typer.Option("--as", help="The name to publish it as.")],
    registry: Place = None,
    gate: Annotated[str | None, typer.Option(help="What must hold, in target, general and slices.")] = None,
    alias: Alias = "live",
    json: Annotated[Path | None, typer.Option(help="Write the gate's answer here as JSON.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write the gate's answer here as JUnit XML.")] = None,
) -> None:
    """Put an adapter into service under a name, if the gate lets it through; exit code 3 if not.

    The gate holds the score card against an expression: "target.bleu > live - 1 and general.nats.high < base + 0.1",
    where live is the version in service, base and few_shot the bare base, and .low and .high the ends of the
    interval. Left to itself (or "default") it asks for "target is better and general.nats < base + 0.05", and that
    no slice of the target is worse. Equal bytes are one version, however often published; a refused one is kept where
    no name reaches it.
    Example: postil publish runs/support/adapter --as support --registry notes
    """
    from postil.judging.gate.gate import DEFAULT, GateResult

    try:
        version = _registry(registry).publish(
            adapter, name, gate=DEFAULT if gate in (None, "default") else gate, alias=alias
        )
    except GateError as error:
        if isinstance(error.result, GateResult):
            _report(error.result, name, json, junit)
        raise
    if version.gate is not None:
        _report(version.gate, name, json, junit)
        console.note(version.gate.sentence)
        if version.gate.worse:
            console.warn(f"slices that got worse: {', '.join(version.gate.worse)}")
    if not version.new:
        console.note("these bytes were published before; it is the same version")
    console.note(f"{name}@{alias} {'now points' if version.moved else 'pointed already'} at {version.short}")
    console.out.print(version.digest, soft_wrap=True)


def list_(registry: Place = None) -> None:
    """List the published names, their versions and the aliases that point at them.

    Example: postil list --registry notes
    """
    found = _registry(registry)
    names = found.names()
    if not names:
        console.note("nothing is published yet")
    for name in names:
        versions = found.versions(name)
        refused = sum(event.action == "refuse" for event in found.history(name))
        console.out.print(
            f"{name}  {len(versions)} version{'s' * (len(versions) != 1)}{f', {refused} refused' if refused else ''}",
            soft_wrap=True, markup=False,
        )  # fmt: skip
        for digest, aliases in versions.items():
            console.out.print(f"  {digest[:12]}  {', '.join(aliases)}".rstrip(), soft_wrap=True, markup=False)


def show(
    version: Annotated[str, typer.Argument(help="NAME, NAME@ALIAS or NAME@VERSION (its first digits).")],
    registry: Place = None,
) -> None:
    """Show a version, every byte of it verified: digest, base, measures; and what was done to its name.

    Example: postil show support@live --registry notes
    """
    found = _registry(registry)
    facts = _facts(found.version(version))
    for key, value in facts.items():
        console.out.print(f"{key:>10}  {value}", soft_wrap=True, markup=False)
    for event in found.history(version.partition("@")[0]):
        moved = "refused" if event.action == "refuse" else event.action
        gate = f"  [{event.gate}] {event.sentence}" if event.sentence else ""
        line = f"{event.number:>10}  {event.when}  {event.who}  {moved} {event.alias} {event.version[:12]}{gate}"
        console.out.print(line, soft_wrap=True, markup=False)


def promote(
    name: Name,
    version: Annotated[str, typer.Argument(help="The version's first digits, four at least, or another alias.")],
    registry: Place = None,
    alias: Alias = "live",
) -> None:
    """Point an alias at a version that was published under the name before.

    Example: postil promote support 3f2a91c0 --registry notes
    """
    _tell(_registry(registry).promote(name, version, alias), alias)


def rollback(name: Name, registry: Place = None, alias: Alias = "live") -> None:
    """Put the version before back into service; once more goes further back.

    Example: postil rollback support --registry notes
    """
    _tell(_registry(registry).rollback(name, alias), alias)


def _registry(place: Path | None) -> Registry:
    from postil.registry import Registry

    if place is None:
        raise RegistryError("which registry? Name its directory with --registry DIR, or set POSTIL_REGISTRY")
    return Registry(place)


def _report(result: GateResult, name: str, json: Path | None, junit: Path | None) -> None:
    from postil.files import write_json, write_text

    if json is not None:
        write_json(json, result.as_dict())
    if junit is not None:
        write_text(junit, result.junit(name))


def _tell(version: Version, alias: str) -> None:
    console.note(f"{version.name}@{alias} {'now points' if version.moved else 'pointed already'} at {version.short}")
    console.out.print(version.digest, soft_wrap=True)


def _facts(version: Version) -> dict[str, str]:
    """What is known of a version, for the terminal."""
    from postil.judging.card.file import read_card

    facts = {
        "version": version.digest,
        "aliases": ", ".join(version.aliases) or "none",
        "base": f"{version.base.get('source', 'unknown')} {version.base.get('form', '')}".rstrip(),
        "directory": str(version.path),
    }
    card = read_card(version.path)
    if card is None:
        return facts
    parts = {"target": card.target, **{f"general.{name}": part for name, part in card.general.items()}}
    for path, part in parts.items():
        m = part.measures.get(part.main) if part is not None else None
        if m is not None:
            facts[path] = (
                f"{m.metric} {m.base.value:.4g} → {m.adapter.value:.4g} {m.unit}, "
                f"difference {m.difference.value:.3g} [{m.difference.low:.3g}, {m.difference.high:.3g}]"
                f"{': ' if m.told else ''}{m.told}"
            )
    return facts
