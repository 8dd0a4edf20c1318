"""The version is one: in the package, on the command line's word and at the top of the changelog."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import postil

ROOT = Path(__file__).parents[2]


def test_changelog_opens_with_the_package_version() -> None:
    headings = re.findall(r"^## \[([^\]]+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    newest, when = headings[0]
    assert newest == postil.__version__
    assert when == "unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", when)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in headings[1:])


def test_installed_version_is_the_one_of_the_sources() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == postil.__version__
