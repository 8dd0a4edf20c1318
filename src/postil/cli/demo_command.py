"""postil demo: three teams, three notes, one base: trained, judged, published, rolled back, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from postil import console
from postil.cli.tables import print_table

if TYPE_CHECKING:
    from postil.demo import Demo


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where runs, registry, report go.")] = Path("demo-report"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train three notes on the small known base, judge and publish them, answer for all in one batch.

    Exits non-zero unless all three are measurably better than the bare base, pass the default gate, and one is rolled
    back and forward again. --out must be new, or an earlier demo's, whose runs and registry are made anew.
    Example: postil demo --out demo-report
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from postil.demo import run_demo

    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn(),
        console=console.err, transient=True,
    ) as bar:  # fmt: skip
        tasks: dict[str, Any] = {}

        def watch(what: str, event: dict[str, Any]) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=event["total"], told="")
            bar.update(tasks[what], completed=event["done"], total=event["total"], told=event["told"])

        result = run_demo(out, device=device, tell=lambda text: bar.console.print(text, style="dim"), watch=watch)
    _print(result)
    if not result.good:
        raise typer.Exit(1)


def _print(result: Demo) -> None:
    rows = [["team", "measure", "base", "note", "prose", "chat", "the policy's answer"]]
    for team in result.teams:
        general = [team.general(part) for part in ("nats", "chat")]
        rows.append([
            team.team.name, team.team.measure, f"{team.target.base.value:.1f}", f"{team.target.adapter.value:.1f}",
            *(f"{found.difference.value:+.3f}" if found is not None else "not asked" for found in general),
            team.verdict,
        ])  # fmt: skip
    print_table(rows, right=range(2, 6))
    service = result.service
    for what, why in service.refused.items():
        console.out.print(f"{what}: {why}", soft_wrap=True, markup=False)
    rolled = "was rolled back and forward, which its answers show" if service.proven else "was NOT rolled back"
    console.out.print(
        f"{service.requests} requests of {len(service.live)} live versions and the bare base in one run: "
        f"{service.seconds:.0f} s; one name {rolled}; the base's live tensors are "
        f"{'unchanged' if result.unchanged else 'CHANGED'}; {result.seconds:.0f} s in all",
        soft_wrap=True,
    )
    console.out.print(f"report: {result.report}", soft_wrap=True)
