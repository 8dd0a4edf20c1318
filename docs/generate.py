"""Writes the generated parts of README.md and docs/*.md, and the pictures of what was measured.

A part stands between `<!-- generated: NAME -->` and `<!-- end of generated -->`; NAME is a key of PARTS. `make docs`
rewrites the parts, `make check` (with --check) fails where one is stale.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import typer
from damage import picture
from pydantic import BaseModel
from tables import benches, evidence, main_job, many_tasks, off_task

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/postil"
PART = re.compile(r"(?<=<!-- generated: )(\w+)( -->\n)(.*?)(?=<!-- end of generated -->)", re.DOTALL)


def job(path: Path) -> str:
    """The first line of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def tree(package: Path = PACKAGE) -> str:
    """One line a file of the package, with its job: a folder's own files, then the folders in it."""
    return "```text\n" + "\n".join([f"src/{package.name}/", *branch(package, "  ")]) + "\n```\n"


def branch(folder: Path, indent: str) -> Iterator[str]:
    """The lines of one folder; a folder's job is that of its `__init__.py`, which has no line of its own."""
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield f"{indent}{path.name}".ljust(26) + f"  {job(path)}"
    for inner in sorted(folder.iterdir()):
        if (inner / "__init__.py").is_file():
            yield f"{indent}{inner.name}/".ljust(26) + f"  {job(inner / '__init__.py')}"
            yield from branch(inner, indent + "  ")


def commands(app: typer.Typer | None = None) -> str:
    """The reference of every command: what it does, its arguments, its options with their defaults."""
    if app is None:
        from postil.cli import app
    return "\n".join(described(typer.main.get_command(app), ["postil"]))


def described(command: object, words: list[str]) -> Iterator[str]:
    """Markdown lines of one command, then of those below it."""
    yield f"## `{' '.join(words)}`\n"
    if text := inspect.cleandoc(command.help or "").replace("\b", "").replace("\f", ""):
        yield f"{text}\n"
    entries = [described_parameter(one) for one in command.params if not getattr(one, "hidden", False)]
    if entries:
        yield "\n".join(entries) + "\n"
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from described(inner, [*words, name])


def described_parameter(parameter: object) -> str:
    """One list item: the names, the words of help, the default where there is one to tell."""
    if parameter.param_type_name == "argument":
        names = parameter.name.upper()
    else:
        names = ", ".join([*parameter.opts, *parameter.secondary_opts])
    said = " ".join((getattr(parameter, "help", None) or "").split())
    default = parameter.default
    told = isinstance(default, str | int | float) and not isinstance(default, bool) and default != ""
    entry = f"- `{names}`" + (f": {said}" if said else "")
    return entry + (f" (default `{default}`)" if told else " (required)" if parameter.required else "")


def keys() -> str:
    """Every key of a recipe and of a judging's settings: its class's words, then the defaults."""
    from postil.adapter import LoraConfig
    from postil.data import DataOptions
    from postil.judging.options import GeneralOptions, HarnessOptions, JudgeOptions, LeakageOptions
    from postil.training import Recipe, TrainOptions

    places = {
        "a recipe": Recipe, "`training`": TrainOptions, "`lora`": LoraConfig, "`rows`": DataOptions,
        "`postil judge --set`": JudgeOptions, "its `general`": GeneralOptions, "its `leakage`": LeakageOptions,
        "its `lm_eval`": HarnessOptions,
    }  # fmt: skip
    return "\n".join(line for name, kind in places.items() for line in described_keys(name, kind))


def described_keys(name: str, kind: type) -> Iterator[str]:
    """Markdown lines of one group of keys."""
    yield f"## Keys of {name}\n"
    yield inspect.cleandoc(kind.__doc__ or "") + "\n"
    told = []
    for key, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True)
        inner = isinstance(default, BaseModel) or field.is_required()
        told.append(f"`{key}`" if inner else f"`{key}: {plain(default)}`")
    yield ", ".join(told) + "\n"


def plain(value: object) -> str:
    """A default as YAML has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(plain, value))}]" if isinstance(value, tuple) else str(value).replace("\n", "\\n")


PARTS = {
    "off_task": off_task,
    "keys": keys,
    "commands": commands,
    "tree": tree,
    "main_job": main_job,
    "evidence": evidence,
    "many_tasks": many_tasks,
    "benches": benches,
}


def refreshed(text: str) -> str:
    """A page's text with every generated part made anew."""
    return PART.sub(lambda part: f"{part[1]}{part[2]}{PARTS[part[1]]()}", text)


def pictures() -> dict[Path, str]:
    """Every picture that is made from results, by its file."""
    found = {folder.name: picture(folder) for folder in sorted((ROOT / "recipes/evidence").iterdir())}
    return {ROOT / f"docs/img/{name}.svg": text for name, text in found.items() if text}


def main(arguments: list[str], pages: list[Path], made: dict[Path, str] | None = None) -> int:
    """Rewrite the pages and what is made whole, or with --check say which are stale; the exit code."""
    made = made or {}
    old = {page: page.read_text(encoding="utf-8") for page in pages}
    wanted = {page: refreshed(text) for page, text in old.items()} | made
    old |= {path: path.read_text(encoding="utf-8") if path.is_file() else "" for path in made}
    stale = {path: text for path, text in wanted.items() if text != old[path]}
    for path, text in stale.items():
        if "--check" in arguments:
            print(f"{path.name} is stale; mend it with: make docs", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"{path.name} is new")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], pictures()))
