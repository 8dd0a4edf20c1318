"""The command line: one file a command, one place that turns an error into a sentence and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer

from postil.cli import (
    adapter_commands,
    base_commands,
    cache_command,
    convert_command,
    data_commands,
    demo_command,
    doctor_command,
    judge_command,
    plan_command,
    policy_commands,
    quantize_command,
    registry_commands,
    report_command,
    shrink_command,
    spectrum_command,
    train_command,
    use_commands,
)
from postil.errors import PostilError

USAGE: type[Exception] = typer.BadParameter.__mro__[1]  # typer exports only this subclass of a slip's error

REFUSED = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)  # what a path may run into

app = typer.Typer(
    name="postil",
    help="One frozen base, many notes: train, keep and use LoRA adapters on large language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(version("postil"))
        raise typer.Exit


@app.callback()
def _first(
    _asked: Annotated[
        bool, typer.Option("--version", help="Say the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """One frozen base, many notes: train, keep and use LoRA adapters on large language models."""


app.add_typer(base_commands.app, name="base")
app.add_typer(data_commands.app, name="data")
app.add_typer(adapter_commands.adapters, name="adapters")
app.command()(plan_command.plan)
app.command()(train_command.train)
app.command()(judge_command.judge)
app.command()(use_commands.generate)
app.command()(use_commands.chat)
app.command()(adapter_commands.inspect)
app.command()(adapter_commands.merge)
app.command()(spectrum_command.spectrum)
app.command()(shrink_command.shrink)
app.command()(report_command.report)
app.command()(convert_command.convert)
app.command()(quantize_command.quantize)
app.command()(registry_commands.publish)
app.command()(cache_command.cache)
app.add_typer(policy_commands.app, name="registry")
app.command("list", hidden=True)(registry_commands.list_)  # short forms of what `postil registry` does
app.command(hidden=True)(registry_commands.show)
app.command(hidden=True)(registry_commands.promote)
app.command(hidden=True)(registry_commands.rollback)
app.command()(doctor_command.doctor)
app.command()(demo_command.demo)


def main() -> None:
    """Run the command line; exit code 2 for the user's mistakes, 1 for ours, 3 for a refusal, 4: run it again."""
    try:
        command = typer.main.get_command(app)
        with command.make_context("postil", sys.argv[1:]) as context:  # not app(): it would hide a Ctrl-C
            command.invoke(context)
    except PostilError as error:
        print(f"postil: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except typer.Exit as ending:
        raise SystemExit(ending.exit_code) from None
    except KeyboardInterrupt:
        print("postil: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        if error.errno not in REFUSED or error.filename is None:
            raise
        print(f"postil: {error.filename}: {error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None
    except USAGE as error:
        print(usage_sentence(error), file=sys.stderr)
        raise SystemExit(2) from None


def usage_sentence(error: Any) -> str:
    """One sentence for a slip in the words of a command; the help where a group was given no word at all."""
    context, said = error.ctx, " ".join(error.format_message().split())
    if context is not None and error.message == context.get_help():
        return str(error.message)
    near = getattr(error, "possibilities", None)
    if near:
        said = f"No such option {error.option_name} (did you mean {near[0]}?)"
    elif ". Did you mean " in said:
        said = f"{said.replace('. Did you mean ', ' (did you mean ', 1)})"
    else:
        said = said.removesuffix(".") + (f" (see {context.command_path} --help)" if context else "")
    return f"postil: {said}"
