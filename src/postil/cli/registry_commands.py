"""postil publish, and postil registry list, show, promote, rollback: adapters by policy into service, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from postil import console
from postil.errors import GateError, RegistryError

if TYPE_CHECKING:
    from postil.registry import Registry, Version
    from postil.registry.state import Event

app = typer.Typer(
    help="Published adapters: what is in service, by which policy, since when; promote, roll back, retire, tidy up.",
    no_args_is_help=True,
)

Place = Annotated[
    str | None,
    typer.Option("--registry", envvar="POSTIL_REGISTRY", help="The registry's directory; or set POSTIL_REGISTRY."),
]
Name = Annotated[str, typer.Argument(help="A published name.")]
Alias = Annotated[str, typer.Option(help="The alias to move; a bare name means live.")]
Override = Annotated[
    str | None, typer.Option("--override", help="A reason to do what the policy refuses; it is logged.")
]
NewBase = Annotated[bool, typer.Option("--new-base", help="Bind the name to this version's base from here on.")]
Json = Annotated[Path | None, typer.Option(help="Write the policy's answer here as JSON.")]
Junit = Annotated[Path | None, typer.Option(help="Write the policy's answer here as JUnit XML.")]


def publish(
    adapter: Annotated[Path, typer.Argument(help="A judged adapter's directory.")],
    name: Annotated[str, typer.Option("--as", help="The name to publish it as.")],
    registry: Place = None,
    alias: Alias = "live",
    override: Override = None,
    new_base: NewBase = False,
    json: Json = None,
    junit: Junit = None,
    gate: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Put an adapter into service under a name, if the alias's policy lets it through; exit code 3 if not.

    The policy belongs to the name's alias in the registry (postil registry policy), not to the publisher; until one
    is set it is the default gate. The score card is held against it, and every promotion and roll-back asks it again.
    What it refuses is kept where no name reaches it until `postil registry gc`. The first publication binds the name
    to the adapter's base. Equal bytes are one version, however often published.
    Example: postil publish runs/support/adapter --as support --registry notes
    """
    if gate is not None:
        raise RegistryError(
            f"the gate belongs to {name}@{alias} and not to its publisher; set it once with `postil registry policy "
            f'{name} --alias {alias} --gate "{gate}"`, or publish this version in spite of it with --override "why"'
        )
    with _answered(name, json, junit):
        version = opened(registry).publish(adapter, name, alias=alias, override=override, new_base=new_base)
    _report(version.gate, name, json, junit)
    _tell(version, alias, "" if version.new else "these bytes were published before; it is the same version")


@app.command("list")
def list_(registry: Place = None) -> None:
    """List the published names, their versions and the aliases that point at them.

    Example: postil registry list --registry notes
    """
    found = opened(registry)
    names = found.names()
    if not names:
        console.note("nothing is published yet")
    for name in names:
        versions = found.versions(name)
        refused = sum(event.action == "refuse" for event in found.history(name))
        retired = len(found.state(name).retired)
        counts = [f"{len(versions)} version{'s' * (len(versions) != 1)}"]
        counts += [f"{count} {word}" for count, word in ((refused, "refused"), (retired, "retired")) if count]
        _print(f"{name}  {', '.join(counts)}")
        published = found.state(name).published
        for digest, aliases in versions.items():
            scope = "  (for its own task alone)" if published[digest].scope == "task" else ""
            _print(f"  {digest[:12]}  {', '.join(aliases)}".rstrip() + scope)


@app.command()
def show(
    version: Annotated[str, typer.Argument(help="NAME, NAME@ALIAS or NAME@VERSION (its first digits).")],
    registry: Place = None,
) -> None:
    """Show a version: digest, base, scope, measures; the policies of its name, and what was done to it.

    Its bytes are verified where they are fetched to be used; `postil registry verify` reads them all.
    Example: postil registry show support@live --registry notes
    """
    found = opened(registry)
    name = version.partition("@")[0]
    for key, value in _facts(found.version(version)).items():
        _print(f"{key:>10}  {value}")
    for alias, policy in sorted(found.state(name).policies.items()):
        _print(f"{'policy':>10}  {alias}: {'; '.join(f'{key} {value}' for key, value in policy.told.items())}")
    for event in found.history(name):
        _print(_told(event))


@app.command()
def promote(
    name: Name,
    version: Annotated[str, typer.Argument(help="The version's first digits, four at least, or another alias.")],
    registry: Place = None,
    alias: Alias = "live",
    override: Override = None,
    new_base: NewBase = False,
    json: Json = None,
    junit: Junit = None,
) -> None:
    """Point an alias at a version that was published under the name, if the alias's policy lets its card through.

    Example: postil registry promote support 3f2a91c0 --registry notes
    """
    with _answered(name, json, junit):
        moved = opened(registry).promote(name, version, alias, override=override, new_base=new_base)
    _report(moved.gate, name, json, junit)
    _tell(moved, alias)


@app.command()
def rollback(
    name: Name,
    registry: Place = None,
    alias: Alias = "live",
    override: Override = None,
    new_base: NewBase = False,
    json: Json = None,
    junit: Junit = None,
) -> None:
    """Put the version before back into service, if the alias's policy still lets it; once more goes further back.

    Example: postil registry rollback support --registry notes
    """
    with _answered(name, json, junit):
        moved = opened(registry).rollback(name, alias, override=override, new_base=new_base)
    _report(moved.gate, name, json, junit)
    _tell(moved, alias)


def opened(place: str | None) -> Registry:
    """The registry that --registry or POSTIL_REGISTRY names. Raises RegistryError where neither does."""
    from postil.registry import Registry

    if not place:
        raise RegistryError("which registry? Name its directory with --registry DIR, or set POSTIL_REGISTRY")
    return Registry(place)


@contextmanager
def _answered(name: str, json: Path | None, junit: Path | None) -> Iterator[None]:
    """Write the policy's answer also where it refuses."""
    try:
        yield
    except GateError as error:
        _report(error.result, name, json, junit)
        raise


def _report(result: object, name: str, json: Path | None, junit: Path | None) -> None:
    from postil.files import write_json, write_text
    from postil.judging.gate.gate import GateResult

    if not isinstance(result, GateResult):
        return
    if json is not None:
        write_json(json, result.as_dict())
    if junit is not None:
        write_text(junit, result.junit(name))


def _tell(version: Version, alias: str, known: str = "") -> None:
    if version.gate is not None:
        console.note(version.gate.sentence)
        if version.gate.worse:
            console.warn(f"slices that got worse: {', '.join(version.gate.worse)}")
    if version.overridden:
        console.warn("the policy was overridden, which is logged")
    if version.scope == "task":
        console.warn("this version is for its own task alone (its card's scope)")
    if known:
        console.note(known)
    console.note(f"{version.name}@{alias} {'now points' if version.moved else 'pointed already'} at {version.short}")
    console.out.print(version.digest, soft_wrap=True)


def _told(event: Event) -> str:
    done = "refused" if event.action == "refuse" else event.action
    gate = f"  [{event.gate}] {event.sentence}" if event.sentence else ""
    policy = f"  {'; '.join(f'{key} {value}' for key, value in event.policy.told.items())}" if event.policy else ""
    base = f"  {event.base}" if event.action == "rebind" else ""
    why = f"  because: {event.reason}" if event.reason else ""
    what = " ".join(word for word in (done, event.alias, event.version[:12]) if word)
    return f"{event.number:>10}  {event.when}  {event.who}  {what}{base}{policy}{gate}{why}"


def _print(line: str) -> None:
    console.out.print(line, soft_wrap=True, markup=False)


def _facts(version: Version) -> dict[str, str]:
    """What is known of a version, for the terminal."""
    facts = {
        "version": version.digest,
        "aliases": ", ".join(version.aliases) or "none",
        "base": f"{version.base.get('source', 'unknown')} {version.base.get('form', '')}".rstrip(),
    }
    card = version.card
    if card is None:
        return facts
    facts["scope"] = "anything (assistant)" if card.scope == "assistant" else "its own task alone (task)"
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
