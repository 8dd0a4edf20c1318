"""The public names are frozen here, and neither they nor the command's help load torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import postil
from postil import errors

PUBLIC = [
    "AdaptedModel",
    "Adapter",
    "AdapterError",
    "AnswerError",
    "Base",
    "BaseModelError",
    "Corrupt",
    "DataError",
    "Engine",
    "GateError",
    "InternalError",
    "JudgeError",
    "JudgeOptions",
    "LoraConfig",
    "NotFound",
    "PostilError",
    "RecipeError",
    "Refused",
    "Registry",
    "RegistryConflict",
    "RegistryError",
    "Request",
    "RequestError",
    "RunError",
    "ScoreCard",
    "StorageError",
    "Unavailable",
    "__version__",
    "attach",
    "detach",
    "export_merged",
    "judge",
    "load_adapter",
    "load_base",
    "load_data",
    "merge",
    "plan",
    "publish",
    "save_adapter",
    "shrink",
    "spectrum",
    "train",
    "unmerge",
]

REPORT_HEAVY = """
import sys
heavy = {"torch", "transformers", "datasets", "peft"} & set(sys.modules)
sys.exit(f"loaded: {sorted(heavy)}" if heavy else 0)
"""

CLI_HELP = """
import sys
import postil.cli
for words in {commands!r}:
    sys.argv = ["postil", *words, "--help"]
    try:
        postil.cli.main()
    except SystemExit as stop:
        if stop.code:
            raise
"""


def run_fresh(code: str) -> None:
    """Run `code` in a new interpreter where every warning is an error; fail with what it said."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stderr}\n{done.stdout}"


def command_paths() -> list[list[str]]:
    """The words of every command of `postil`, groups and the bare command included."""
    typer = pytest.importorskip("typer")
    from postil.cli import app

    found: list[list[str]] = []

    def walk(command: object, words: list[str]) -> None:
        found.append(words)
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, [*words, name])

    walk(typer.main.get_command(app), [])
    return found


def test_public_names_are_frozen() -> None:
    assert sorted(postil.__all__) == PUBLIC


def test_every_error_is_public() -> None:
    tree = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert tree <= set(PUBLIC)
    assert all(issubclass(getattr(postil, name), postil.PostilError) for name in tree)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_found(name: str) -> None:
    value = getattr(postil, name)
    assert getattr(value, "__name__", name) == name
    assert name in dir(postil)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'postil' has no attribute 'trian'"):
        _ = postil.trian


def test_verbs_stay_functions_when_their_modules_are_imported() -> None:
    run_fresh(
        "import postil.training, postil.adapter.merge\nassert callable(postil.train) and callable(postil.merge)"
    )


def test_importing_postil_is_light() -> None:
    run_fresh("import postil\nassert postil.PostilError\ndir(postil)\n" + REPORT_HEAVY)


def test_the_help_of_every_command_is_light() -> None:
    commands = command_paths()
    assert ["train"] in commands
    run_fresh(CLI_HELP.format(commands=commands) + REPORT_HEAVY)
