"""Options that several commands have, written once."""

from __future__ import annotations

from typing import Annotated

import typer

Code = Annotated[bool, typer.Option("--trust-remote-code", help="Let the base's directory run its own code.")]
