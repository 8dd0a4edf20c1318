"""postil registry policy, retire, delete-alias, unpublish, verify, gc: what is asked, and what is kept."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from postil import console
from postil.cli.registry_commands import Name, Place, opened
from postil.cli.registry_commands import app as app  # the group, with these commands in it
from postil.errors import Corrupt, RegistryError, listed

Reason = Annotated[str, typer.Option(help="Why; it is logged.")]


@app.command()
def policy(
    name: Annotated[str, typer.Argument(help="A name, published or to be published.")],
    registry: Place = None,
    alias: Annotated[str, typer.Option(help="The alias that asks it.")] = "live",
    gate: Annotated[
        str | None, typer.Option(help='What must hold, in target, general and slices, or "default".')
    ] = None,
    scope: Annotated[
        str | None, typer.Option(help="assistant: no notes for their own task alone; task: these too.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help='A base\'s source, or "bound": the one that the name is bound to.')
    ] = None,
    override_by: Annotated[
        str | None, typer.Option(help="Who may override it: users a,b, or anyone, or nobody.")
    ] = None,
    reason: Reason = "",
) -> None:
    """Show what an alias asks of a version before it moves there; with options, set it.

    The gate is an expression: "target.bleu > live - 1 and general.nats.high < base + 0.1", where live is the version
    in service, base and few_shot the bare base, and .low and .high the ends of the interval. Publishing, promoting
    and rolling back ask it of the stored score card. An alias without a policy of its own asks the default gate.
    Example: postil registry policy support --gate "target.bleu > live - 1" --scope assistant --registry notes
    """
    found = opened(registry)
    changes: dict[str, Any] = {"gate": gate, "scope": scope}
    if base is not None:
        changes["base"] = "" if base == "bound" else base
    changes = {key: value for key, value in changes.items() if value is not None}
    if override_by is not None:
        changes["overriders"] = _users(override_by)
    asked = found.policy(name, alias)
    if changes:
        asked = found.set_policy(name, type(asked)(**dict(asked) | changes), alias, reason=reason)
    elif reason:
        raise RegistryError(
            "--reason says why a policy changes; name what changes as well, for example --gate default"
        )
    for key, value in asked.told.items():
        console.out.print(f"{key:>10}  {value}", soft_wrap=True, markup=False)


@app.command()
def retire(
    name: Name,
    version: Annotated[str, typer.Argument(help="The version's first digits, four at least.")],
    registry: Place = None,
    reason: Reason = "",
) -> None:
    """Serve a version no more under this name; gc removes its bytes in the end, what was done to it stays on record.

    Example: postil registry retire support 3f2a91c0 --reason "trained on the wrong rows" --registry notes
    """
    digest = opened(registry).retire(name, version, reason)
    console.note(f"{name} serves {digest[:12]} no more; publish its adapter again to take that back")


@app.command("delete-alias")
def delete_alias(
    name: Name,
    alias: Annotated[str, typer.Argument(help="The alias that goes.")],
    registry: Place = None,
    reason: Reason = "",
) -> None:
    """Take an alias away; its policy stays for the day that it comes back.

    Example: postil registry delete-alias support canary --registry notes
    """
    opened(registry).delete_alias(name, alias, reason)
    console.note(f"{name}@{alias} is gone")


@app.command()
def unpublish(name: Name, registry: Place = None, reason: Reason = "") -> None:
    """Take a name out of service: every alias goes, every version is retired; what was done stays on record.

    Example: postil registry unpublish support --reason "the product ended" --registry notes
    """
    opened(registry).unpublish(name, reason)
    console.note(f"nothing is in service as {name} any more")


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(help="A published name; all of them if left out.")] = None,
    registry: Place = None,
) -> None:
    """Read every byte of what is in service, and name what was changed, cut short or removed.

    Example: postil registry verify --registry notes
    """
    faults = opened(registry).verify(name)
    for fault in faults[1:]:
        console.warn(fault)
    if faults:
        raise Corrupt(faults[0])
    console.note("every byte is as it was published")


@app.command()
def gc(
    registry: Place = None,
    grace: Annotated[float, typer.Option(help="Days that what is in no use is kept.")] = 7.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
) -> None:
    """Remove what no name has served for a while: versions refused, retired or never finished, and their bytes.

    Example: postil registry gc --grace 30 --registry notes
    """
    gone, freed = opened(registry).collect(grace, dry=dry_run)
    what = f"{len(gone)} version{'s' * (len(gone) != 1)}" + (f" ({listed(d[:12] for d in gone)})" if gone else "")
    console.note(f"{'would remove' if dry_run else 'removed'} {what}, {freed / 1e6:,.1f} MB of files")


def _users(given: str) -> tuple[str, ...] | None:
    if given == "anyone":
        return None
    return () if given == "nobody" else tuple(name.strip() for name in given.split(",") if name.strip())
