"""The import contract of pyproject.toml, so that a breach fails under plain pytest too."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("importlinter")

ROOT = Path(__file__).parents[2]
LINT = "from importlinter.cli import lint_imports_command as lint; lint(['--no-logo', '--no-cache'])"


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    """Check the package in `root`/src by the contract in `root`/pyproject.toml."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", LINT], cwd=root, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def skeleton(tmp_path: Path) -> Path:
    """The contract over a package of empty folders, one for every name in it, to break."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    for name in re.findall(r"\w+", " ".join(layers)):
        folder = tmp_path / "src/postil" / name
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (tmp_path / "src/postil/__init__.py").write_text("import postil.base\n")
    return tmp_path


def test_folders_import_only_from_their_left() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_contract_holds_for_imports_from_the_left(skeleton: Path) -> None:
    (skeleton / "src/postil/training/inner.py").write_text("import postil.data, postil.errors\n")
    done = lint_imports(skeleton)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("postil.kernels", "postil.adapter"),
        ("postil.data", "postil.base"),
        ("postil.engine", "postil.training"),
        ("postil.judging", "postil.reporting"),
        ("postil.reporting", "postil.registry"),
        ("postil.adapter", "postil.cli"),
        ("postil.errors", "postil.kernels"),
    ],
)
def test_an_import_from_the_right_is_refused(skeleton: Path, importer: str, imported: str) -> None:
    file = skeleton / "src" / importer.replace(".", "/") / "inner.py"
    file.write_text(f"def later():\n    import {imported}\n")
    done = lint_imports(skeleton)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{importer} is not allowed to import {imported}" in done.stdout


def test_a_folder_without_a_place_is_refused(skeleton: Path) -> None:
    (skeleton / "src/postil/sundries.py").write_text('"""A module that no layer names."""\n')
    done = lint_imports(skeleton)
    assert done.returncode == 1
    assert "sundries" in done.stdout
