"""constraints.txt pins what pyproject.toml asks for, exactly, and names no machine and no index."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pins() -> dict[str, str]:
    """Package to version, for every line that is no comment; a line of another form fails."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)", line) for line in lines if line[:1] != "#"]
    assert all(found), "every line is NAME==VERSION, without a local suffix such as +cpu"
    return {normal(match[1]): match[2] for match in found if match}


def normal(name: str) -> str:
    """A package's name as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_everything_asked_for_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *project["optional-dependencies"]["test"],
        *project["optional-dependencies"]["dev"],
    ]
    names = {normal(re.match(r"[A-Za-z0-9._-]+", one)[0]) for one in asked}  # type: ignore[index]
    assert names <= pins().keys()
    assert "postil" not in pins()


def test_a_pin_in_the_project_is_the_same_pin() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    exact = re.findall(r'"([A-Za-z0-9._-]+)==([0-9][^"]*)"', text)
    assert exact
    assert all(pins()[normal(name)] == version for name, version in exact)
