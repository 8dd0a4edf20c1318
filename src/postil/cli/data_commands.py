"""postil data show: what a model would learn from a file, token by token, in colour."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from postil import console
from postil.errors import BaseModelError

app = typer.Typer(help="Look at training data as the model will see it.", no_args_is_help=True)


@app.command()
def show(
    data: Annotated[str, typer.Argument(help="A JSONL file (.gz and .zst too), Parquet, or a hub name.")],
    base: Annotated[str, typer.Option("--base", "-b", help="The base whose tokenizer and template apply.")],
    rows: Annotated[int, typer.Option("--rows", "-n", help="How many samples to show.")] = 3,
    format_: Annotated[str, typer.Option("--format", help="auto, chat, prompt, raw or text.")] = "auto",
    learn: Annotated[str, typer.Option(help="Which assistant turns are learned: all, last or weight.")] = "all",
    skip_bad_lines: Annotated[bool, typer.Option(help="Put bad lines into FILE.bad.jsonl and go on.")] = False,
) -> None:
    """Show learned and masked text of the first samples, and the counts of the whole file.

    Example: postil data show train.jsonl --base smollm2-135m-instruct
    """
    from postil.data import DataOptions, load_data, show_samples

    options = DataOptions.parse({"format": format_, "learn": learn, "skip_bad_lines": skip_bad_lines})
    tokenizer, context = tokenizer_of(base)
    dataset = load_data(data, tokenizer, options, context=context)
    for panel in show_samples(dataset.samples[:rows], tokenizer):
        console.out.print(panel)
    for line in dataset.report.lines():
        console.out.print(line, markup=False)


def tokenizer_of(base: str) -> tuple[Any, int | None]:
    """A base's tokenizer and context without its weights where it is a directory; else with them."""
    from pathlib import Path

    from postil.base import fetch, load_base
    from postil.base.catalog import names
    from postil.base.load import open_tokenizer

    directory = fetch(base, progress=console.note) if base in names() else Path(base).expanduser()
    if directory.is_dir():
        return open_tokenizer(directory)
    loaded = load_base(base)
    if loaded.tokenizer is None:
        raise BaseModelError(f"{base}: no tokenizer was found beside the model; data cannot be read without one")
    return loaded.tokenizer, loaded.context
