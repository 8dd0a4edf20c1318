"""postil cache: what judgings keep is counted and forgotten, and nothing is wrong where nothing is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from postil.engine.memory import kept


def test_what_is_kept_is_counted_and_forgotten(
    postil: Callable[..., Any], base: Path, adapter: Path, tmp_path: Path
) -> None:
    assert ": 0 files, 0.0 MB of at most 537 MB" in postil("cache").out
    assert postil("cache", "--empty").out.startswith("0 files forgotten")
    (tmp_path / "text.jsonl").write_text('{"text": "some text that nobody has learned, long enough to be judged on"}')
    words = ("judge", adapter, "--base", base, "--general", tmp_path / "text.jsonl", "--chat", "none", "--no-keep")
    assert postil(*words).code == 0
    files = len(kept())
    assert files == 2  # likelihoods of the base, and of the adapter
    assert f": {files} files, " in postil("cache").out
    assert postil("cache", "--empty").out.startswith(f"{files} files forgotten in ")
    assert kept() == []
    assert postil(*words).code == 0
