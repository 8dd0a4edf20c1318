"""What every catalog and every blob store must do, asked of each kind: commits, revisions, ageing, half a failure."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from postil.errors import Corrupt, GateError, RegistryConflict, RegistryError, StorageError, Unavailable
from postil.registry import Policy, Registry
from postil.registry.cache import materialise
from postil.registry.ports import Blobs, Catalog
from postil.registry.state import Act, State
from published import Failing, record

Judged = Callable[..., Path]
A, B = record(1).manifest.digest, record(2).manifest.digest
FOREVER = float("inf")


def move(version: str, action: str = "publish", alias: str = "live") -> Act:
    return Act.parse({"action": action, "alias": alias, "version": version})


def kept(place: Path, text: str = "some bytes") -> tuple[str, Path]:
    """A file and the SHA-256 of its bytes."""
    place.write_text(text)
    return hashlib.sha256(text.encode()).hexdigest(), place


# -- the catalog ----------------------------------------------------------------------------------------


def test_an_untouched_name(catalog: Catalog) -> None:
    assert catalog.state("support") == State()
    assert catalog.events("support") == []
    assert "support" not in catalog.names()
    assert catalog.record(A) is None


def test_a_commit_is_numbered_timed_and_signed(catalog: Catalog) -> None:
    state = catalog.commit("support", 0, [move(A)], "alice", record(1))
    assert (state.revision, state.live) == (1, {"live": A})
    assert catalog.state("support") == state
    catalog.commit("support", 1, [Act(action="override", reason="why"), move(B)], "bob", record(2))
    events = catalog.events("support")
    assert [(e.number, e.action, e.who) for e in events] == [
        (1, "publish", "alice"), (2, "override", "bob"), (3, "publish", "bob")
    ]  # fmt: skip
    assert all(event.when.endswith("+00:00") for event in events)
    assert [event.number for event in catalog.events("support", since=1, limit=1)] == [2]
    assert catalog.record(B) == record(2)
    assert "support" in catalog.names()


def test_compare_and_set(catalog: Catalog) -> None:
    for expected in (1, 7):
        with pytest.raises(RegistryConflict, match="support was written to by another process meanwhile"):
            catalog.commit("support", expected, [move(A)], "alice", record(1))
    assert catalog.state("support").revision == 0
    assert catalog.record(A) is None  # nothing of a commit that was refused
    catalog.commit("support", 0, [move(A)], "alice")
    with pytest.raises(RegistryConflict):
        catalog.commit("support", 0, [move(B)], "bob")
    assert catalog.state("support").live == {"live": A}
    catalog.commit("other", 0, [move(B)], "bob")  # names do not disturb each other


def test_a_b_a_is_told_from_a(catalog: Catalog) -> None:
    seen = catalog.commit("support", 0, [move(A)], "alice")
    catalog.commit("support", 1, [move(B, "promote")], "bob")
    back = catalog.commit("support", 2, [move(A, "promote")], "bob")
    assert back.live == seen.live
    with pytest.raises(RegistryConflict):
        catalog.commit("support", seen.revision, [move(B, "promote")], "alice")
    gone = catalog.commit("support", 3, [Act(action="delete", alias="live")], "bob")
    assert gone.live == {}
    again = catalog.commit("support", 4, [move(A, "promote")], "bob")
    assert again.aliases["live"].revision > back.aliases["live"].revision


def test_a_record_without_an_act_moves_nothing(catalog: Catalog) -> None:
    before = catalog.commit("support", 0, [move(A)], "alice")
    assert catalog.commit("support", 1, [], "alice", record(1)) == before
    assert catalog.record(A) == record(1)
    assert len(catalog.events("support")) == 1


def test_a_record_needs_its_blobs(catalog: Catalog, blobs: Blobs, tmp_path: Path) -> None:
    digest, file = kept(tmp_path / "file")
    needing = record(3, {"README.md": digest})
    with pytest.raises(RegistryConflict, match=r"README.md was collected while it was published"):
        catalog.commit("support", 0, [move(needing.manifest.digest)], "alice", needing)
    assert catalog.state("support") == State()
    blobs.put(digest, file)
    catalog.commit("support", 0, [move(needing.manifest.digest)], "alice", needing)


@pytest.mark.parametrize("name", ["", "Support", "../x", "a/b", ".hidden"])
def test_a_name_that_cannot_be_one_is_not_written(catalog: Catalog, name: str) -> None:
    with pytest.raises(RegistryError, match="cannot be a published name"):
        catalog.commit(name, 0, [move(A)], "alice")


def test_what_is_collected(catalog: Catalog, blobs: Blobs, tmp_path: Path) -> None:
    shared, mine, theirs, loose = (kept(tmp_path / name, name)[0] for name in ("shared", "mine", "theirs", "loose"))
    for digest, name in ((shared, "shared"), (mine, "mine"), (theirs, "theirs"), (loose, "loose")):
        blobs.put(digest, tmp_path / name)
    served, refused = record(1, {"a": shared, "b": mine}), record(2, {"a": shared, "b": theirs})
    state = catalog.commit("support", 0, [move(served.manifest.digest)], "alice", served)
    catalog.commit("support", state.revision, [move(refused.manifest.digest, "refuse")], "alice", refused)

    def collect(before: float, dry: bool = False) -> tuple[list[str], int]:
        return catalog.collect(before, partial(blobs.sweep, before=before, dry=dry), dry)

    assert collect(time.time() - 60) == ([], 0)  # all of it is young
    assert collect(FOREVER, dry=True) == ([refused.manifest.digest], len("theirs") + len("loose"))
    assert catalog.record(refused.manifest.digest) is not None
    assert collect(FOREVER) == ([refused.manifest.digest], len("theirs") + len("loose"))
    assert catalog.record(refused.manifest.digest) is None
    assert [blobs.has(digest) for digest in (shared, mine, theirs, loose)] == [True, True, False, False]
    assert len(catalog.events("support")) == 2
    assert collect(FOREVER) == ([], 0)
    for name in catalog.names():  # what was there before is served as it was
        for version in catalog.state(name).served:
            found = catalog.record(version)
            assert found is not None
            for digest in found.manifest.files.values():
                blobs.verify(digest)


# -- the blob store -------------------------------------------------------------------------------------


def test_bytes_go_in_and_out(blobs: Blobs, tmp_path: Path) -> None:
    digest, file = kept(tmp_path / "file", "x" * 3_000_000)
    assert not blobs.has(digest)
    assert blobs.put(digest, file)
    assert not blobs.put(digest, file)
    blobs.fetch(digest, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == file.read_bytes()
    blobs.verify(digest)
    empty, nothing = kept(tmp_path / "nothing", "")
    assert blobs.put(empty, nothing)
    blobs.verify(empty)


def test_other_bytes_do_not_go_in(blobs: Blobs, tmp_path: Path) -> None:
    digest, file = kept(tmp_path / "file")
    file.write_text("other bytes")
    with pytest.raises(RegistryError, match="changed while it was published"):
        blobs.put(digest, file)
    assert not blobs.has(digest)
    with pytest.raises(Corrupt, match="is not there"):
        blobs.fetch(digest, tmp_path / "out")
    with pytest.raises(Corrupt, match="is not there"):
        blobs.verify(digest)


def test_the_age_of_a_blob_begins_anew_when_it_is_put_again(blobs: Blobs, tmp_path: Path) -> None:
    digest, file = kept(tmp_path / "file")
    blobs.put(digest, file)
    later = time.time() + 0.02
    while time.time() < later:
        time.sleep(0.01)
    middle = time.time()
    time.sleep(0.02)
    blobs.put(digest, file)
    assert blobs.sweep([], before=middle) == 0
    assert blobs.has(digest)
    assert blobs.sweep([digest], before=FOREVER) == 0
    assert blobs.sweep([], before=FOREVER, dry=True) == len("some bytes")
    assert blobs.has(digest)
    assert blobs.sweep([], before=FOREVER) == len("some bytes")
    assert not blobs.has(digest)


# -- both under a registry ------------------------------------------------------------------------------


@pytest.mark.parametrize("puts", range(4))
def test_a_blob_store_that_fails_half_way_publishes_nothing(
    ports: tuple[Catalog, Blobs], judged: Judged, puts: int
) -> None:
    catalog, blobs = ports
    sound = Registry(catalog, blobs)
    old = sound.publish(judged(0), "support")
    with pytest.raises(Unavailable) as failure:
        Registry(catalog, Failing(blobs, puts=puts)).publish(judged(1), "support")
    assert failure.value.exit_code == 4
    assert sound.version("support").digest == old.digest
    assert len(sound.history("support")) == 1
    new = sound.publish(judged(1), "support")
    assert (new.moved, sound.verify()) == (True, [])


@pytest.mark.parametrize("fetches", range(4))
def test_a_blob_store_that_fails_half_way_leaves_no_half_version(
    ports: tuple[Catalog, Blobs], judged: Judged, fetches: int
) -> None:
    catalog, blobs = ports
    version = Registry(catalog, blobs).publish(judged(0), "support")
    with pytest.raises(Unavailable):
        Registry(catalog, Failing(blobs, fetches=fetches)).resolve("support")
    place = Registry(catalog, blobs).resolve("support")
    assert place.name == version.digest
    assert {path.name for path in place.parent.iterdir() if path.name[0] != "."} == {place.name, f"{place.name}.json"}


def test_a_reader_during_gc(ports: tuple[Catalog, Blobs], judged: Judged, tmp_path: Path) -> None:
    """What a reader has fetched stays; one that fetches while its version is collected gets it whole or is told."""
    catalog, blobs = ports
    registry = Registry(catalog, blobs)
    old, new = registry.publish(judged(0), "support"), registry.publish(judged(1), "support")
    manifest = catalog.record(old.digest)
    assert manifest is not None
    reading = registry.resolve(f"support@{old.digest}")
    registry.retire("support", old.digest)

    class Collecting(Failing):
        def fetch(self, digest: str, target: Path) -> None:
            registry.collect(grace=0)
            super().fetch(digest, target)

    with pytest.raises(Corrupt, match=f"of version {old.short}; publish the adapter again"):
        materialise(Collecting(blobs), manifest.manifest, tmp_path / "another")
    assert (reading / "adapter_model.safetensors").is_file()
    assert {path.name for path in (tmp_path / "another").iterdir()} <= {f".{old.digest}.lock"}
    assert Registry(catalog, Collecting(blobs), cache=tmp_path / "another").resolve("support").name == new.digest


def test_a_publisher_during_gc(ports: tuple[Catalog, Blobs], judged: Judged) -> None:
    """Blobs that are collected between their copy and the commit, at no grace at all, are copied again."""
    catalog, blobs = ports
    registry = Registry(catalog, blobs)
    registry.publish(judged(0), "support")

    class Collected(Failing):
        def put(self, digest: str, source: Path) -> bool:
            done = super().put(digest, source)
            if self.puts == 95:  # the last of the files
                registry.collect(grace=0)
            return done

    version = Registry(catalog, Collected(blobs)).publish(judged(1), "support")
    assert version.moved
    assert registry.verify() == []


def test_two_publishers_do_not_wait_for_each_other(ports: tuple[Catalog, Blobs], judged: Judged) -> None:
    """While one copies a large adapter, which here takes as long as the test likes, another publishes, promotes and
    rolls back, under another name and under the same."""
    catalog, blobs = ports
    quick = Registry(catalog, blobs)
    copying, go_on = threading.Event(), threading.Event()

    class Slow(Failing):
        def put(self, digest: str, source: Path) -> bool:
            copying.set()
            assert go_on.wait(60)
            return super().put(digest, source)

    done: list[str] = []
    large, small = judged(0), [judged(seed) for seed in (1, 2)]
    slow = threading.Thread(target=lambda: done.append(Registry(catalog, Slow(blobs)).publish(large, "large").digest))
    slow.start()
    assert copying.wait(60)
    first, second = (quick.publish(place, "small") for place in small)
    assert quick.rollback("small").digest == first.digest
    assert quick.promote("small", second.short).moved
    other = quick.publish(small[0], "large", alias="canary")
    assert quick.collect(grace=0)[0] == []
    assert (slow.is_alive(), done) == (True, [])
    go_on.set()
    slow.join(60)
    assert quick.version("large").digest == done[0] != other.digest
    assert quick.state("large").live == {"canary": other.digest, "live": done[0]}
    assert quick.verify() == []


def test_an_alias_that_was_moved_while_its_files_were_copied_is_a_conflict(
    ports: tuple[Catalog, Blobs], judged: Judged
) -> None:
    catalog, blobs = ports
    registry = Registry(catalog, blobs)
    registry.publish(judged(0), "support")
    other = judged(2)

    class Overtaken(Failing):
        def put(self, digest: str, source: Path) -> bool:
            if self.puts == 99:
                registry.publish(other, "support")
            return super().put(digest, source)

    with pytest.raises(RegistryConflict, match="another process moved it meanwhile") as conflict:
        Registry(catalog, Overtaken(blobs)).publish(judged(1), "support")
    assert conflict.value.exit_code == 4
    assert [event.action for event in registry.history("support")] == ["publish", "publish"]
    assert registry.publish(judged(1), "support").moved


def test_a_policy_that_changed_while_files_were_copied_is_asked(ports: tuple[Catalog, Blobs], judged: Judged) -> None:
    catalog, blobs = ports
    registry = Registry(catalog, blobs)
    registry.publish(judged(0), "support")

    class Stricter(Failing):
        def put(self, digest: str, source: Path) -> bool:
            registry.set_policy("support", Policy(gate="target.bleu > base + 1000"))
            return super().put(digest, source)

    with pytest.raises(GateError, match="is not above base"):
        Registry(catalog, Stricter(blobs)).publish(judged(1), "support")
    assert [event.action for event in registry.history("support")] == ["publish", "policy", "refuse"]


def test_files_of_several_users_are_readable_as_the_umask_says(blobs: Blobs, tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        digest, file = kept(tmp_path / "file")
        file.chmod(0o600)
        blobs.put(digest, file)
        blobs.fetch(digest, tmp_path / "out")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o664


def test_a_full_disk_is_a_sentence(
    ports: tuple[Catalog, Blobs], judged: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, blobs = ports
    registry = Registry(catalog, blobs)
    registry.publish(judged(0), "support")

    def full(source: Path, target: Path) -> str:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("postil.registry.blobs.copied", full)
    with pytest.raises(StorageError, match=r"could not be written \(No space left on device\)"):
        registry.publish(judged(1), "support")
    with pytest.raises(StorageError, match="No space left on device"):
        registry.resolve("support")
    monkeypatch.undo()
    assert registry.verify() == []
    assert registry.load("support").tensors
