"""The generator of the docs' reference: it tells every option, and notices a stale page."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import typer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def app() -> typer.Typer:
    """A little command line with a group, an argument, a required option and a default."""
    app = typer.Typer(help="Notes in the margin.", add_completion=False)
    inner = typer.Typer(help="Books.")
    app.add_typer(inner, name="base")

    @app.command()
    def train(
        data: Path,
        out: Annotated[Path, typer.Option(help="Where the run goes.")],
        rank: Annotated[int, typer.Option("--rank", "-r", help="Of each note.")] = 8,
        quick: bool = False,
    ) -> None:
        """Write a note."""

    @inner.command()
    def get(name: str) -> None:
        """Fetch a book."""

    return app


def test_the_commands_page_tells_all(generate: ModuleType, app: typer.Typer) -> None:
    page = generate.commands(app)
    assert "Notes in the margin." in page
    assert "## `postil train`\n\nWrite a note.\n" in page
    assert "- `DATA` (required)\n" in page
    assert "- `--out`: Where the run goes. (required)\n" in page
    assert "- `--rank, -r`: Of each note. (default `8`)\n" in page
    assert "- `--quick, --no-quick`\n" in page
    assert "## `postil base get`\n\nFetch a book.\n" in page


def test_the_tree_names_files_and_folders(generate: ModuleType, tmp_path: Path) -> None:
    package = tmp_path / "postil"
    (package / "data").mkdir(parents=True)
    for name, says in {
        "__init__": "Names.",
        "errors": "Errors.",
        "data/__init__": "Rows.",
        "data/pack": "Packs.",
    }.items():
        (package / f"{name}.py").write_text(f'"""{says}\n\nMore.\n"""\n')
    lines = [line.split() for line in generate.tree(package).splitlines()[1:-1]]
    assert lines == [
        ["src/postil/"],
        ["errors.py", "Errors."],
        ["data/", "Rows."],
        ["pack.py", "Packs."],
    ]


def test_a_stale_page_fails_the_check_and_is_mended(
    generate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(generate.PARTS, "tree", lambda: "the tree\n")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- generated: tree -->\nold\n<!-- end of generated -->\nafter\n")
    assert generate.main(["--check"], [page]) == 1
    assert capsys.readouterr().err == "page.md is stale; mend it with: make docs\n"
    assert "old" in page.read_text()
    assert generate.main([], [page]) == 0
    assert page.read_text() == "before\n<!-- generated: tree -->\nthe tree\n<!-- end of generated -->\nafter\n"
    assert generate.main(["--check"], [page]) == 0
