"""The way from training to use in docs/judging.md: its commands, run as they are written there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs/judging.md"


def rows(path: Path, numbers: range) -> None:
    told = [{"prompt": f"Where is order {i}?", "completion": f"Order {i} is on its way."} for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in told))


def test_train_judge_publish_generate_roll_back(
    postil: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "train.jsonl", range(20))
    rows(tmp_path / "test.jsonl", range(20, 32))
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    lines = [shlex.split(line.replace("BASE", str(base))) for line in block.splitlines()]
    results = [postil(*words[1:]) for words in lines]
    assert [result.code for result in results] == [0, 0, 0, 0, 0, 0, 2], [result.err for result in results]
    assert "support" in results[4].out
    assert (tmp_path / "runs/support/report.html").is_file()
    again = postil(*lines[3][1:])
    assert again.code == 0
    assert len(list((tmp_path / "notes/versions").iterdir())) == 1
