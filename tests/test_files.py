"""Atomic writes: the old or the new, never a mixture, nothing of the user's removed, kills mended."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from postil import files
from postil.errors import StorageError
from postil.files import atomic_directory, atomic_file, remove_leftovers


def write(target: Path, text: str, marker: str | None = "mark") -> None:
    with atomic_directory(target, marker=marker) as temporary:
        (temporary / "mark").write_text(text)


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    with pytest.raises(ValueError, match="stop"), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise ValueError("stop")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_is_replaced_whole(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    write(tmp_path / "a", "one")
    write(tmp_path / "a", "two")
    assert (tmp_path / "a/mark").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_kill_between_two_renames_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    write(tmp_path / "a", "one")
    real = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == "a":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(files, "_remove", lambda path: None)  # a killed process cleans nothing up
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", "two")
    monkeypatch.undo()
    assert not (tmp_path / "a").exists()
    remove_leftovers(tmp_path)
    assert (tmp_path / "a/mark").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("own", ["folder", "no marker", "file"])
def test_what_a_user_put_there_stays(own: str, tmp_path: Path) -> None:
    target = tmp_path / "a"
    if own == "file":
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "mine.txt").write_text("mine")
        if own == "folder":
            (target / "mark").touch()
            (target / "sub").mkdir()
    with pytest.raises(StorageError, match="nothing was written"):
        write(target, "new")
    assert "mine" in (target if own == "file" else target / "mine.txt").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_lies_beside_goes_with_it_when_asked(tmp_path: Path) -> None:
    target = tmp_path / "a"
    write(target, "one")
    (target / "notes.txt").write_text("mine")
    (target / ".#notes.txt").symlink_to("nowhere")  # an editor's lock
    (target / "model-00001-of-00002.safetensors").write_text("old weights")
    with atomic_directory(target, marker="mark", carry=True) as temporary:
        (temporary / "mark").write_text("two")
    assert sorted(path.name for path in target.iterdir()) == [".#notes.txt", "mark", "notes.txt"]
    assert (target / "mark").read_text() == "two"
    assert (target / "notes.txt").read_text() == "mine"
    write(target, "three")
    assert [path.name for path in target.iterdir()] == ["mark"]


def test_without_a_marker_nothing_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "a", "one")
    with pytest.raises(StorageError, match="nothing was written"):
        write(tmp_path / "a", "two", marker=None)
