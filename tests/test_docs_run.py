"""The examples of README and docs run as they are written."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from postil.training import Recipe

ROOT = Path(__file__).parents[1]
ROWS = [{"prompt": f"Where is order {i}?", "completion": f"Order {i} is on its way."} for i in range(9)]


def blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of one language in a page."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.base
@pytest.mark.usefixtures("rows")
def test_the_readme_in_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("README.md", "python")
    assert len(code.splitlines()) <= 12
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()
    assert (tmp_path / "adapters/support/adapter_config.json").is_file()


@pytest.mark.base
def test_the_flat_loop(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["loop.py", "smollm2-135m-instruct", str(rows), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / "examples/loop.py"))
    assert (tmp_path / "out/adapter_model.safetensors").is_file()


def test_the_recipe_of_the_docs() -> None:
    (text,) = blocks("docs/recipes.md", "yaml")
    recipe = Recipe.parse(yaml.safe_load(text))
    assert recipe.training.learning_rate == 2e-4
