"""postil data show: what a model would learn from a file, token by token, in colour."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from postil import console
from postil.cli.words import Code
from postil.errors import BaseModelError, DataError

app = typer.Typer(help="Look at training data as the model will see it.", no_args_is_help=True)


@app.command()
def show(
    data: Annotated[str, typer.Argument(help="A JSONL file (.gz and .zst too), Parquet, or a hub name.")],
    base: Annotated[str, typer.Option("--base", "-b", help="The base whose tokenizer and template apply.")],
    rows: Annotated[int, typer.Option("--rows", "-n", min=0, help="How many samples to show.")] = 3,
    format_: Annotated[str, typer.Option("--format", help="auto, chat, prompt, raw or text.")] = "auto",
    learn: Annotated[str, typer.Option(help="Which assistant turns are learned: all, last or weight.")] = "all",
    separator: Annotated[str | None, typer.Option(help="Stands between a raw prompt and its completion.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a sample may have (else the context).")] = None,
    too_long: Annotated[str, typer.Option(help="drop, truncate, split (text) or error.")] = "drop",
    columns: Annotated[
        list[str] | None, typer.Option("--columns", help="name=column, e.g. prompt=question; repeatable.")
    ] = None,
    trust_remote_code: Code = False,
    skip_bad_lines: Annotated[bool, typer.Option(help="Put bad lines into FILE.bad.jsonl and go on.")] = False,
) -> None:
    """Show learned and masked text of the first samples, and the counts of the whole file.

    Example: postil data show train.jsonl --base smollm2-135m-instruct
    """
    from postil.data import DataOptions, load_data, show_samples

    given = {"format": format_, "learn": learn, "separator": separator, "max_length": max_length,
             "too_long": too_long, "columns": _mapping(columns or []), "skip_bad_lines": skip_bad_lines}  # fmt: skip
    options = DataOptions.parse({key: value for key, value in given.items() if value is not None})
    tokenizer, context = tokenizer_of(base, trust_remote_code)
    dataset = load_data(data, tokenizer, options, context=context)
    for panel in show_samples(dataset.samples[:rows], tokenizer, marks=not console.out.is_terminal):
        console.out.print(panel)
    for line in dataset.report.lines():
        console.out.print(line, markup=False)


def _mapping(columns: list[str]) -> dict[str, str]:
    """`prompt=question` and the like as a mapping. Raises DataError for what is no such pair, or a name twice."""
    pairs = [given.partition("=") for given in columns]
    for name, mark, column in pairs:
        if not (name and mark and column):
            raise DataError(f"--columns {name}{mark}{column}: write name=column, such as --columns prompt=question")
        if sum(other == name for other, _, _ in pairs) > 1:
            raise DataError(f"--columns names a column for {name!r} twice; give one")
    return {name: column for name, _, column in pairs}


def tokenizer_of(base: str, trust_remote_code: bool = False) -> tuple[Any, int | None]:
    """A base's tokenizer and context; its weights are read only where it is no directory or may run its own code."""
    from pathlib import Path

    from postil.base import fetch, load_base
    from postil.base.catalog import names
    from postil.base.load import open_tokenizer

    directory = fetch(base, progress=console.note) if base in names() else Path(base).expanduser()
    if directory.is_dir() and not trust_remote_code:
        return open_tokenizer(directory)
    loaded = load_base(base, trust_remote_code=trust_remote_code)
    if loaded.tokenizer is None:
        raise BaseModelError(f"{base}: no tokenizer was found beside the model; data cannot be read without one")
    return loaded.tokenizer, loaded.context
