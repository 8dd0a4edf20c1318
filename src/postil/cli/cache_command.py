"""postil cache: what bases and adapters said to earlier judgings, counted, or forgotten."""

from __future__ import annotations

from typing import Annotated

import typer

from postil import console


def cache(
    empty: Annotated[bool, typer.Option("--empty", help="Forget all of it; the next judging asks again.")] = False,
) -> None:
    """Show where answers to earlier judgings are kept, and how many bytes of at most how many; or forget them.

    Example: postil cache --empty
    """
    from postil.engine.memory import MOST_BYTES, bound, kept, place

    if empty:
        console.out.print(f"{bound(0)} files forgotten in {place()}", soft_wrap=True, markup=False)
        return
    files = kept()
    size = sum(path.stat().st_size for path in files)
    told = f"{place()}: {len(files)} files, {size / 1e6:.1f} MB of at most {MOST_BYTES / 1e6:.0f} MB"
    console.out.print(told, soft_wrap=True, markup=False)
