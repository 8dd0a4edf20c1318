"""postil report: a run, an adapter or a sweep as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from postil import console


def report(
    places: Annotated[list[Path], typer.Argument(help="Run or adapter directories; several make a sweep.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page (default: report.html in the run).")
    ] = None,
    predictions: Annotated[Path | None, typer.Option(help="Answers that `postil judge --predictions` wrote.")] = None,
    spectra: Annotated[bool, typer.Option(help="Take the adapters' spectra.")] = True,
) -> None:
    """Write one self-contained page: learning curves, score card, spectra, answers beside the base's.

    Example: postil report runs/support --out report.html
    """
    from postil.errors import JudgeError
    from postil.reporting.report import REPORT, write_report
    from postil.reporting.reported import run_of

    for place in places:
        if not place.is_dir():
            raise JudgeError(f"{place} is no directory; name a run's or an adapter's")
    if out is None:
        run = run_of(places[0])
        if run is None or len(places) > 1:
            raise JudgeError("say where the page goes: --out report.html")
        out = run / REPORT
    console.out.print(str(write_report(places, out, predictions=predictions, spectra=spectra)), soft_wrap=True)
