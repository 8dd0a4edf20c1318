"""The command line: one file a command, one place that turns an error into a sentence and an exit code."""

from __future__ import annotations

import sys

import typer

from postil.cli import (
    adapter_commands,
    base_commands,
    convert_command,
    data_commands,
    demo_command,
    doctor_command,
    train_command,
    use_commands,
)
from postil.errors import PostilError

app = typer.Typer(
    name="postil",
    help="One frozen base, many notes: train, keep and use LoRA adapters on large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(base_commands.app, name="base")
app.add_typer(data_commands.app, name="data")
app.add_typer(adapter_commands.adapters, name="adapters")
app.command()(train_command.train)
app.command()(use_commands.generate)
app.command()(use_commands.chat)
app.command()(adapter_commands.inspect)
app.command()(adapter_commands.merge)
app.command()(convert_command.convert)
app.command()(doctor_command.doctor)
app.command()(demo_command.demo)


def main() -> None:
    """Run the command line; exit code 2 for the user's mistakes, 1 for ours, 3 for the gate's refusal."""
    try:
        app()
    except PostilError as error:
        print(f"postil: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("postil: stopped", file=sys.stderr)
        raise SystemExit(130) from None
