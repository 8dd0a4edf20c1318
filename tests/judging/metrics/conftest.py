"""The project's shared data sets, for tests that read them; without them these tests are skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture
def shared() -> Path:
    """The folder of data sets beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the data sets beside the repository are not here")
    return SHARED


@pytest.fixture
def shared_rows(shared: Path) -> Callable[[str], list[dict[str, Any]]]:
    """shared_rows(name): the rows of one JSONL file."""
    return lambda name: [json.loads(line) for line in (shared / name).read_text(encoding="utf-8").splitlines()]
