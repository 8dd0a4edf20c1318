"""postil demo: three teams, three notes, one base, from training to a report page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from postil import console
from postil.cli.tables import print_table

if TYPE_CHECKING:
    from postil.demo import Demo


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where adapters and report go.")] = Path("demo-report"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train three adapters on the small known base, score them, answer for all in one batch.

    Exits non-zero unless all three are measurably better than the bare base. --out must be new, or an earlier demo's.
    Example: postil demo --out demo-report
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from postil.demo import run_demo

    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeElapsedColumn(),
        console=console.err, transient=True,
    ) as bar:  # fmt: skip
        tasks: dict[str, Any] = {}

        def watch(title: str, event: dict[str, Any]) -> None:
            if title not in tasks:
                tasks[title] = bar.add_task(title, total=event["total_steps"], loss="")
            bar.update(tasks[title], completed=event["step"], loss=f"loss {event['loss']:.2f}")

        result = run_demo(out, device=device, tell=lambda text: bar.console.print(text, style="dim"), watch=watch)
    _print(result)
    if not result.good:
        raise typer.Exit(1)


def _print(result: Demo) -> None:
    rows = [["team", "measure", "base", "note", "nats base", "nats note", "general text", "verdict"]]
    for team in result.teams:
        rows.append([
            team.team.name, team.team.measure, f"{team.base_score:.1f}", f"{team.score:.1f}", f"{team.base_loss:.2f}",
            f"{team.loss:.2f}",
            f"{team.general - result.base_general:+.3f}", "better" if team.better else "no evidence",
        ])  # fmt: skip
    print_table(rows, right=range(2, 7))
    same = "unchanged" if result.digest_before == result.digest_after else "CHANGED"
    console.out.print(
        f"{result.batch_rows} requests of three adapters and the bare base in one run: {result.batch_seconds:.0f} s; "
        f"the base's live tensors are {same}; {result.seconds:.0f} s in all",
        soft_wrap=True,
    )
    console.out.print(f"report: {result.report}", soft_wrap=True)
