"""postil demo: what it prints and its exit code, and the directories that it must not replace."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from postil import demo
from postil.demo import run as story
from postil.demo import work


def result(out: Path, good: bool) -> Any:
    estimates = {"base": SimpleNamespace(value=1.0), "adapter": SimpleNamespace(value=2.0)}
    chat = SimpleNamespace(difference=SimpleNamespace(value=0.01))
    team = SimpleNamespace(
        team=SimpleNamespace(name="tools", measure="exact calls, %"), target=SimpleNamespace(**estimates),
        general=lambda part: chat if part == "chat" else None, verdict="published" if good else "refused",
    )  # fmt: skip
    service = SimpleNamespace(
        refused={} if good else {"tools": "refused: worse"}, proven=good, requests=8, seconds=1.0, live={"tools": 1}
    )
    return SimpleNamespace(
        teams=[team], service=service, unchanged=good, seconds=2.0, report=out / "report.html", good=good
    )


@pytest.mark.parametrize("good", [True, False])
def test_the_exit_code_is_the_verdict(
    postil: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: bool
) -> None:
    monkeypatch.setattr(demo, "run_demo", lambda out, **_: result(out, good))
    done = postil("demo", "--out", tmp_path / "d")
    assert done.code == (0 if good else 1)
    assert ("published" in done.out, "tools: refused: worse" in done.out) == (good, not good)
    assert ("CHANGED" in done.out) is not good
    assert ("NOT rolled back" in done.out) is not good
    assert "not asked" in done.out
    assert "report.html" in done.out


def test_a_directory_of_the_user_is_left_alone(refusal: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: Any, **__: Any) -> None:
        raise AssertionError("the directory was accepted")

    monkeypatch.setattr(work, "load_base", reached)
    monkeypatch.chdir(tmp_path)
    Path("tools").mkdir()
    Path("tools/mine.txt").write_text("keep me")
    assert "is a directory with files in it already" in refusal("demo", "--out", ".")
    Path("result.json").write_text(json.dumps({"teams": 3}))  # not of a demo
    assert "is a directory with files in it already" in refusal("demo", "--out", ".")
    assert Path("tools/mine.txt").read_text() == "keep me"
    for earlier in (story.UNFINISHED, story.UNFINISHED | {"good": True, "seconds": 3}):
        Path("result.json").write_text(json.dumps(earlier))
        with pytest.raises(AssertionError, match="was accepted"):
            demo.run_demo(".")
    with pytest.raises(AssertionError, match="was accepted"):
        demo.run_demo("new")
