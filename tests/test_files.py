"""Atomic writes: the old or the new, never a mixture, nothing of the user's removed, kills mended."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from postil import files
from postil.errors import StorageError
from postil.files import atomic_directory, atomic_file, remove_leftovers, write_text


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The calls that decide what a power cut leaves, as they are made: what was flushed, with its content of that
    moment, and which name was given to what. Temporary names read TMP."""
    made: list[tuple[str, ...]] = []
    fsync, replace, exchange = os.fsync, os.replace, files._exchange

    def short(path: object) -> str:
        return re.sub(r"\.postil-tmp-[\w.]+-\d+-[0-9a-f]{8}", "TMP", Path(str(path)).name)

    def flushed(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        within = sorted(short(inner) for inner in path.iterdir()) if path.is_dir() else [path.read_text()]
        made.append(("fsync", short(path), *within))
        fsync(handle)

    def renamed(source: Path, target: Path) -> None:
        made.append(("rename", short(source), short(target)))
        replace(source, target)

    def exchanged(first: Path, second: Path) -> bool:
        done = exchange(first, second)
        if done:
            made.append(("exchange", short(first), short(second)))
        return done

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    monkeypatch.setattr(files, "_exchange", exchanged)
    return made


needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names open files by /proc")


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


@needs_proc
def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_it_is_done(
    calls: list[tuple[str, ...]], tmp_path: Path
) -> None:
    """A rename that reaches the disk before the bytes is an empty file after a power cut; one that never reaches it
    was said to be done."""
    place = tmp_path / "place"
    place.mkdir()
    for text in ("one", "two"):
        calls.clear()
        write_text(place / "a", text)
        assert calls == [("fsync", "TMP", text), ("rename", "TMP", "a"), ("fsync", "place", "a")]


@needs_proc
@pytest.mark.parametrize("what", [atomic_file, atomic_directory])
def test_folders_that_were_made_for_it_are_on_the_disk_too(
    what: Callable[[Path], AbstractContextManager[Path]], calls: list[tuple[str, ...]], tmp_path: Path
) -> None:
    with what(tmp_path / "new/newer/a") as temporary:
        assert calls == [("fsync", tmp_path.name, "new"), ("fsync", "new", "newer")]
        if what is atomic_file:
            temporary.touch()
    assert calls[-1] == ("fsync", "newer", "a")


@needs_proc
@pytest.mark.parametrize("exchange", [True, False])
def test_a_directory_is_on_the_disk_with_all_that_is_in_it_before_its_name(
    exchange: bool, calls: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    place = tmp_path / "place"
    place.mkdir()
    with atomic_directory(place / "a", marker="mark", carry=True) as temporary:
        (temporary / "mark").write_text("one")
        (temporary / "notes").write_text("mine")
    assert sorted(calls[:2]) == [("fsync", "mark", "one"), ("fsync", "notes", "mine")]
    assert calls[2:] == [("fsync", "TMP", "mark", "notes"), ("rename", "TMP", "a"), ("fsync", "place", "a")]
    calls.clear()
    with atomic_directory(place / "a", marker="mark", carry=True) as temporary:
        (temporary / "mark").write_text("two")
    assert sorted(calls[:2]) == [("fsync", "mark", "two"), ("fsync", "notes", "mine")]  # what was carried, too
    given = [("exchange", "TMP", "a")] if exchange else [("rename", "a", ".postil-old-a"), ("rename", "TMP", "a")]
    old = "TMP" if exchange else ".postil-old-a"  # is there until the new name is on the disk
    assert calls[2:] == [("fsync", "TMP", "mark", "notes"), *given, ("fsync", "place", old, "a")]
    assert [path.name for path in place.iterdir()] == ["a"]


@needs_proc
def test_folders_within_are_flushed_after_what_they_hold(calls: list[tuple[str, ...]], tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "a") as temporary:
        (temporary / "sub/deep").mkdir(parents=True)
        (temporary / "sub/deep/file").write_text("x")
        (temporary / "link").symlink_to("sub")
    assert calls == [
        ("fsync", "file", "x"), ("fsync", "deep", "file"), ("fsync", "sub", "deep"), ("fsync", "TMP", "link", "sub"),
        ("rename", "TMP", "a"), ("fsync", tmp_path.name, "a"),
    ]  # fmt: skip


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
