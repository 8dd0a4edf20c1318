"""postil base get | list | show: the small known bases, and the facts of any model directory."""

from __future__ import annotations

from typing import Annotated

import typer

from postil import console
from postil.cli.tables import print_table

app = typer.Typer(help="The small known bases, and the facts of any model directory.", no_args_is_help=True)


@app.command()
def get(name: Annotated[str, typer.Argument(help="A name that `postil base list` shows.")]) -> None:
    """Fetch a known base into the cache, once.

    Example: postil base get smollm2-135m-instruct
    """
    from postil.base import fetch

    console.out.print(str(fetch(name, progress=console.note)), soft_wrap=True)


@app.command("list")
def list_() -> None:
    """List the known bases and say which are here.

    Example: postil base list
    """
    from postil.base import list_entries

    rows = [["name", "here", "parameters", "licence", "what"]]
    for entry in list_entries():
        here = "yes" if entry["present"] else "no"
        rows.append([entry["name"], here, f"{entry['parameters']:,}", entry["licence"], entry["summary"]])
    print_table(rows, right=(2,))


@app.command()
def show(source: Annotated[str, typer.Argument(help="A known base's name, a model directory or a GGUF.")]) -> None:
    """Show a base's facts from its files, its fingerprint among them, without loading it.

    Example: postil base show smollm2-135m-instruct
    """
    from postil.base import show as facts_of

    for key, value in facts_of(source).items():
        console.out.print(f"{key:>14}  {value}", soft_wrap=True, markup=False)
