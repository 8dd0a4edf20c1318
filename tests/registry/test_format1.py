"""Registries of format 1: read as they lie, moved by the next write, refused by nobody's mistake."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from postil.errors import Corrupt, Refused
from postil.registry import Registry
from published import format_1

Judged = Callable[..., Path]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the registry lies."""
    return tmp_path / "registry"


def files(root: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_it_is_read_without_a_byte_written(root: Path, judged: Judged) -> None:
    digests = format_1(root, {"support": [judged(0), judged(1)], "other": [judged(2)]})
    before = files(root)
    registry = Registry(root)
    assert registry.names() == ["other", "support"]
    assert registry.versions("support") == dict(zip(digests["support"], ((), ("live",)), strict=True))
    assert registry.load("support").tensors
    assert registry.resolve(f"support@{digests['support'][0]}").name == digests["support"][0]
    assert registry.version("support").card is not None
    assert registry.state("support").base == "sha256:base"
    assert [event.who for event in registry.history("support")] == ["somebody", "somebody"]
    assert registry.verify() == []
    assert files(root) == before


def test_the_next_write_moves_the_name_alone(root: Path, judged: Judged) -> None:
    digests = format_1(root, {"support": [judged(0), judged(1)], "other": [judged(2)]})
    registry = Registry(root)
    assert registry.rollback("support").digest == digests["support"][0]
    assert json.loads((root / "registry.json").read_text()) == {"format": 2}
    assert (root / "names/support/state.json").is_file()
    assert not (root / "aliases/support").exists()
    assert (root / "aliases/other").is_dir()
    assert [event.action for event in registry.history("support")] == ["publish", "publish", "rollback"]
    assert [event.number for event in registry.history("support")] == [1, 2, 3]
    assert registry.version("other").digest == digests["other"][0]
    third = registry.publish(judged(3), "support")
    assert list(registry.versions("support")) == [*digests["support"], third.digest]
    assert registry.verify() == []
    assert registry.collect(grace=0) == ([], 0)
    assert registry.load("other").tensors


def test_equal_bytes_are_the_same_version(root: Path, judged: Judged) -> None:
    digests = format_1(root, {"support": [judged(0)]})
    again = Registry(root).publish(judged(0), "support")
    assert (again.digest, again.moved) == (digests["support"][0], False)
    with pytest.raises(Refused, match="bound to the base sha256:base"):
        Registry(root).publish(judged(5, source="sha256:other"), "support")


def test_what_is_retired_or_was_refused_is_collected(root: Path, judged: Judged) -> None:
    digests = format_1(root, {"support": [judged(0), judged(1)], "gone": [judged(2)]})
    (root / "refused").mkdir()
    (root / "versions" / digests["gone"][0]).rename(root / "refused" / digests["gone"][0])
    (root / "aliases/gone/live.json").unlink()
    (root / "aliases/gone/log.jsonl").write_text("")
    registry = Registry(root)
    registry.retire("support", digests["support"][0])
    gone, _ = registry.collect(grace=0)
    assert sorted(gone) == sorted([digests["support"][0], digests["gone"][0]])
    assert [path.name for path in (root / "refused").iterdir()] == []
    assert registry.load("support").tensors


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "postil.json", "version.json"])
def test_a_changed_byte_is_found(file: str, root: Path, judged: Judged) -> None:
    (digest,) = format_1(root, {"support": [judged(0)]})["support"]
    path = root / "versions" / digest / file
    content = path.read_bytes()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(Corrupt, match=file):
        Registry(root).resolve("support")
    assert Registry(root).publish(judged(0), "support").new
    assert Registry(root).load("support").tensors


def test_a_torn_log_and_a_broken_alias(root: Path, judged: Judged) -> None:
    digests = format_1(root, {"support": [judged(0), judged(1)]})["support"]
    log = root / "aliases/support/log.jsonl"
    whole = log.read_bytes()
    second = whole.index(b"\n") + 1
    for cut in (second, second + 1, len(whole) - 1):
        log.write_bytes(whole[:cut])
        assert [event.version for event in Registry(root).history("support")] == digests
        assert Registry(root).state("support").stack("live") == digests
    (root / "aliases/support/live.json").write_text("{}")
    with pytest.raises(Corrupt, match=r"live.json is no alias .*'number' is required"):
        Registry(root).version("support")


def test_an_alias_ahead_of_a_log_that_was_restored(root: Path, judged: Judged) -> None:
    digests = format_1(root, {"support": [judged(0), judged(1)]})["support"]
    alias = root / "aliases/support/live.json"
    event = json.loads(alias.read_text()) | {"number": 2, "action": "rollback", "version": digests[0]}
    alias.write_text(json.dumps(event))
    assert Registry(root).state("support").live == {"live": digests[0]}
    assert Registry(root).version("support").digest == digests[0]


def test_a_name_is_bound_to_the_base_of_what_is_live(root: Path, judged: Judged) -> None:
    digests = format_1(root, {"support": [judged(0), judged(1, source="sha256:other")]})["support"]
    assert Registry(root).state("support").base == "sha256:other"
    alias = root / "aliases/support/live.json"
    event = json.loads(alias.read_text()) | {"number": 3, "action": "rollback", "version": digests[0]}
    alias.write_text(json.dumps(event))
    assert Registry(root).state("support").base == "sha256:base"
