"""postil spectrum: singular values and effective ranks of what training changed, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from postil import console
from postil.cli.tables import print_table
from postil.cli.words import Code

if TYPE_CHECKING:
    from postil.adapter.spectrum import Spectrum


def spectrum(
    source: Annotated[Path, typer.Argument(help="An adapter directory, or a fully fine-tuned model's.")],
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="Its base: needed for a whole model, else for the norms.")
    ] = None,
    intruders: Annotated[
        bool, typer.Option("--intruders", help="Count new leading directions against the base (slow: SVDs of it).")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write curves as SVG.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Everything, singular values too, as JSON.")] = False,
    trust_remote_code: Code = False,
) -> None:
    """Show how many directions of each layer training really used.

    Effective rank by entropy (Roy & Vetterli 2007), by participation (Gao et al. 2017), and for 99% of the energy.
    Example: postil spectrum runs/support/adapter --base smollm2-135m-instruct --plot spectrum.svg
    """
    from postil.adapter.spectrum import spectrum as run
    from postil.files import write_text
    from postil.reporting.curves import standalone
    from postil.reporting.spectra import charts

    found = run(source, base, intruders=intruders, trust_remote_code=trust_remote_code)
    if plot is not None:
        write_text(plot, standalone(charts(found)))
        console.note(f"curves: {plot}")
    if json_:
        typer.echo(json.dumps([_facts(one) for one in found], indent=1))
        return
    _print(found)


def _facts(one: Spectrum) -> dict[str, Any]:
    return {
        "module": one.path, "shape": [one.d_out, one.d_in], "norm": one.norm, "base_norm": one.base_norm,
        "entropy_rank": one.entropy_rank, "participation_rank": one.participation_rank,
        "energy_rank_99": one.energy_rank(), "intruders": one.intruders, "singular_values": one.values.tolist(),
    }  # fmt: skip


def _print(found: list[Spectrum]) -> None:
    if not found:
        console.out.print("nothing was changed")
        return
    beside = any(one.base_norm is not None for one in found)
    counted = any(one.intruders is not None for one in found)
    head = ["module", "|ΔW|", *(["of |W|"] if beside else []), "largest σ", "entropy", "participation", "99% of σ²"]
    rows = [[*head, *(["intruders"] if counted else [])]]
    for one in found:
        share = f"{one.norm / one.base_norm:.2%}" if one.base_norm else ""
        rows.append([
            one.path, f"{one.norm:.3g}", *([share] if beside else []), f"{one.largest:.3g}",
            f"{one.entropy_rank:.1f}", f"{one.participation_rank:.1f}", f"{one.energy_rank()} of {len(one.values)}",
            *(["" if one.intruders is None else str(one.intruders)] if counted else []),
        ])  # fmt: skip
    print_table(rows, right=range(1, len(rows[0])))
    middle = sorted(one.entropy_rank for one in found)[len(found) // 2]
    told = f"{len(found)} matrices; effective rank (entropy) {middle:.1f} in the middle"
    if counted:
        told += f"; {sum(one.intruders or 0 for one in found)} intruder dimensions (of the first 10 directions each)"
    console.out.print(told, soft_wrap=True)
