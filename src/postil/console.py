"""The one place that writes to the terminal: notes to standard error, results to standard output."""

from __future__ import annotations

from rich.console import Console

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def note(message: str) -> None:
    """Tell the user something that they should know and need not act on."""
    err.print(message, style="dim", markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """Tell the user something that they may want to act on."""
    err.print(f"note: {message}", style="yellow", markup=False, soft_wrap=True)
