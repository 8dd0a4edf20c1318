"""Tables for the terminal, never folded or cut: a pipe gets lines whole, a narrow window breaks them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from postil import console


def print_table(rows: Sequence[Sequence[str]], *, right: Collection[int] = (), bold: Collection[int] = (0,)) -> None:
    """Print rows of equal length, the first one the head; right: columns set to the right; bold: rows."""
    from rich.text import Text

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for number, row in enumerate(rows):
        cells = [
            cell.rjust(width) if n in right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        console.out.print(Text("  ".join(cells).rstrip(), style="bold" if number in bold else ""), soft_wrap=True)
