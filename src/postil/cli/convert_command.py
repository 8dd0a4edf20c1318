"""postil convert: an adapter in a pickle, made one in safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from postil import console


def convert(
    adapter: Annotated[Path, typer.Argument(help="An adapter directory with adapter_model.bin.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the safetensors adapter goes.")],
) -> None:
    """Make a pickled adapter a safetensors one; the pickle is read in a process of its own and runs nothing.

    Example: postil convert old/adapter --out new/adapter
    """
    from postil.adapter.convert import convert as run

    console.out.print(str(run(adapter, out)), soft_wrap=True)
