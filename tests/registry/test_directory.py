"""The catalog in a directory under fire: two processes at one alias, kill -9 at every step, a torn log, the order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from postil.errors import Corrupt, NotFound, RegistryConflict, RegistryError, Unavailable
from postil.registry import Policy, Registry
from postil.registry.directory import DirectoryCatalog
from postil.registry.state import Act
from published import format_1

Judged = Callable[..., Path]
A, B = "a" * 64, "b" * 64

RACER = """
import sys, time
from pathlib import Path
from postil.errors import RegistryConflict
from postil.registry.directory import DirectoryCatalog
from postil.registry.state import Act

root, mine = Path(sys.argv[1]), sys.argv[2]
catalog = DirectoryCatalog(root / "registry", lambda digest: True)
(root / f"ready-{mine[0]}").touch()
while not (root / "go").exists():
    time.sleep(0.001)
for number in range(30):
    try:
        catalog.commit(f"name{number}", 0, [Act(action="publish", alias="live", version=mine)], mine[0])
        print(number)
    except RegistryConflict as refusal:
        assert "by another process meanwhile" in str(refusal), refusal
"""

HOLDER = """
import filelock, sys, time

with filelock.FileLock(sys.argv[1]):
    print(flush=True)
    time.sleep(60)
"""

KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
import postil.adapter.peft_files  # before the fork: torch is loaded once
from postil.registry import Policy, Registry, blobs

root, adapter, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
counted = [(os, "replace"), (os, "fsync"), (os, "utime"), (os, "unlink"), (shutil, "rmtree"), (blobs, "copied")]
DO = {
    "publish": lambda registry: registry.publish(adapter, "support"),
    "override": lambda registry: registry.publish(adapter, "support", override="why"),
    "unpublish": lambda registry: registry.unpublish("support"),
    "collect": lambda registry: registry.collect(grace=0),
}

def do_and_die(place, at):
    "Do it; kill -9 before the call number `at` of those counted, a copy in its middle."
    left = at
    def dying(real):
        def call(*words, **more):
            nonlocal left
            left -= 1
            if left == 0:
                if real is copied:
                    words[1].write_bytes(words[0].read_bytes()[:7])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*words, **more)
        return call
    copied = blobs.copied
    for module, name in counted:
        setattr(module, name, dying(getattr(module, name)))
    DO[what](Registry(place))
    os._exit(0)

at = 0
while True:
    at += 1
    place = Path(shutil.copytree(root / "registry", root / f"killed-{at}"))
    child = os.fork()
    if child == 0:
        do_and_die(place, at)
    ended = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(ended):
        break
print(json.dumps([at - 1, os.WEXITSTATUS(ended)]))
"""


def moved(version: str, action: str = "publish", alias: str = "live", **more: Any) -> list[Act]:
    return [Act.parse({"action": action, "alias": alias, "version": version, **more})]


def killed(tmp_path: Path, adapter: Path, what: str) -> list[Registry]:
    """The registries that kills at every step of what is done to tmp_path/registry left."""
    words = [sys.executable, "-c", KILLED, tmp_path, adapter, what]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    steps, ending = json.loads(done.stdout)
    assert ending == 0
    return [Registry(tmp_path / f"killed-{at}", cache=tmp_path / f"cache-{at}") for at in range(1, steps + 1)]


def assert_tidy(registry: Registry, root: Path) -> None:
    """Everything that is kept is whole and needed."""
    assert registry.verify() == []
    registry.collect(grace=0)
    files = {path.name for path in root.rglob("*") if path.is_file()}
    assert not {name for name in files if ".postil-" in name}
    versions = {path.stem for path in (root / "versions").glob("*.json")}
    served = {digest for name in registry.names() for digest in registry.versions(name)}
    assert versions <= served
    blobs = {digest for version in served for digest in registry.catalog.record(version).manifest.files.values()}  # type: ignore[union-attr]
    assert {path.name for path in (root / "blobs").glob("*")} <= blobs


def test_of_two_processes_at_one_alias_one_wins(tmp_path: Path) -> None:
    racers = [
        subprocess.Popen([sys.executable, "-c", RACER, tmp_path, mine], stdout=subprocess.PIPE, text=True)
        for mine in (A, B)
    ]
    while not all((tmp_path / f"ready-{mine[0]}").exists() for mine in (A, B)):
        assert all(racer.poll() is None for racer in racers)
    (tmp_path / "go").touch()
    won = [set(map(int, racer.communicate(timeout=60)[0].split())) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert won[0] | won[1] == set(range(30))
    assert not won[0] & won[1]
    catalog = DirectoryCatalog(tmp_path / "registry", lambda digest: True)
    for number in range(30):
        assert catalog.state(f"name{number}").live == {"live": A if number in won[0] else B}
        assert len(catalog.events(f"name{number}")) == 1


def test_a_registry_that_appears_while_it_is_looked_for_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog, looked, listed = DirectoryCatalog(tmp_path / "registry", bool), Path.is_dir, Path.iterdir

    def is_dir(path: Path) -> bool:
        found = looked(path)
        if path == catalog.root:
            path.mkdir(exist_ok=True)  # another process's, its marker not yet written
        return found

    def iterdir(path: Path) -> Iterator[Path]:
        if path != catalog.root or looked(path):
            return listed(path)
        path.mkdir()
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    monkeypatch.setattr(Path, "iterdir", iterdir)
    catalog.check_own()
    assert looked(catalog.root)


def test_killed_at_any_step_it_is_the_old_or_the_new(tmp_path: Path, judged: Judged) -> None:
    registry = Registry(tmp_path / "registry")
    old = registry.publish(judged(0), "support").digest
    found = killed(tmp_path, judged(1), "publish")
    new = registry.publish(judged(1), "support").digest
    assert len(found) > 20
    live = [one.version("support").digest for one in found]
    assert live == sorted(live, key=[old, new].index)  # the old one up to one step, the new one from there on
    assert {live[0], live[-1]} == {old, new}
    for one, digest in zip(found, live, strict=True):
        assert one.resolve("support").name == digest  # verifies every byte
        versions = [old, new][: 1 + (digest == new)]
        assert list(one.versions("support")) == versions  # version, publication, event and alias, or none of them
        assert [event.version for event in one.history("support")] == versions
        assert one.publish(judged(1), "support").moved is (digest == old)
        assert one.rollback("support").digest == old
        root = one.blobs.root  # type: ignore[attr-defined]
        events = (root / "names/support/log.jsonl").read_text().splitlines()
        assert [json.loads(line)["number"] for line in events] == [1, 2, 3]
        assert_tidy(one, root)


def test_an_override_and_its_move_are_one_commit(tmp_path: Path, judged: Judged) -> None:
    """Under a name of format 1, which the same commit moves to format 2."""
    (old,) = format_1(tmp_path / "registry", {"support": [judged(0)]})["support"]
    harmful = judged(1, nats=3.5)
    found = killed(tmp_path, harmful, "override")
    assert len(found) > 20
    seen = []
    for one in found:
        actions = [event.action for event in one.history("support")]
        assert actions in (["publish"], ["publish", "override", "publish"])
        assert (one.version("support").digest == old) is (actions == ["publish"])
        assert len(one.versions("support")) == 1 + (len(actions) == 3)
        assert one.resolve("support").is_dir()
        seen.append(len(actions))
        one.publish(harmful, "support", override="why")
        assert [event.number for event in one.history("support")] == [1, 2, 3]
        assert_tidy(one, one.blobs.root)  # type: ignore[attr-defined]
    assert {seen[0], seen[-1]} == {1, 3}


def test_a_name_goes_out_of_service_in_one_step(tmp_path: Path, judged: Judged) -> None:
    registry = Registry(tmp_path / "registry")
    for seed in range(2):
        registry.publish(judged(seed), "support", alias=("live", "canary")[seed])
    found = killed(tmp_path, judged(0), "unpublish")
    for one in found:
        state = one.state("support")
        assert (len(state.live), len(state.served)) in ((2, 2), (0, 0))
        assert len(one.history("support")) in (2, 6)
        one.unpublish("support")
        assert_tidy(one, one.blobs.root)  # type: ignore[attr-defined]


def test_what_is_collected_never_was_needed(tmp_path: Path, judged: Judged) -> None:
    registry = Registry(tmp_path / "registry")
    one, two = (registry.publish(judged(seed), "support") for seed in range(2))
    registry.retire("support", one.short)
    found = killed(tmp_path, judged(0), "collect")
    assert len(found) > 3
    for left in found:
        assert left.load("support").tensors
        assert list(left.versions("support")) == [two.digest]
        assert_tidy(left, left.blobs.root)  # type: ignore[attr-defined]
        assert left.publish(judged(0), "support").digest == one.digest
        assert left.verify() == []


def test_what_is_needed_is_on_the_disk_before_what_needs_it(
    tmp_path: Path, judged: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill keeps what was not yet synced, a power cut does not: so the order of the calls is looked at itself."""
    root, calls, sync, replace = tmp_path / "registry", list[tuple[str, str]](), os.fsync, os.replace

    def named(path: str | Path) -> str:
        return str(Path(path).relative_to(root)) if Path(path).is_relative_to(root) else ""

    def syncing(handle: int) -> None:
        calls.append(("sync", named(os.readlink(f"/proc/self/fd/{handle}"))))
        sync(handle)

    def replacing(source: str | Path, target: str | Path) -> None:
        calls.append(("rename", named(target)))
        assert ("sync", named(source)) in calls, f"{target} got its name before its bytes were on the disk"
        replace(source, target)

    registry = Registry(root)
    registry.publish(judged(0), "support")
    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "replace", replacing)
    version = registry.publish(judged(1), "support")
    monkeypatch.undo()

    def done(target: str) -> int:
        """When a file and its name were both on the disk."""
        renamed = calls.index(("rename", target))
        return calls.index(("sync", str(Path(target).parent)), renamed)

    def begun(target: str) -> int:
        return calls.index(("rename", target))

    record, state, log = f"versions/{version.digest}.json", "names/support/state.json", "names/support/log.jsonl"
    written = [f"blobs/{digest}" for digest in version.files.values() if ("rename", f"blobs/{digest}") in calls]
    assert len(written) == 4
    assert all(done(blob) < begun(record) for blob in written)
    assert done(record) < begun(state)
    assert done(state) < calls.index(("sync", log), begun(state))


def test_a_new_folder_is_on_the_disk_before_what_is_in_it(
    tmp_path: Path, judged: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, sync = tmp_path / "registry", os.fsync
    folders = [root / name for name in ("blobs", "versions", "names", "names/support")]
    named = set[Path]()  # the folders whose own names are on the disk

    def syncing(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        named.update(folder for folder in folders if folder.parent == path and folder.is_dir())
        for folder in folders:
            assert folder in named or folder not in path.parents, f"{path} before {folder}"
        sync(handle)

    monkeypatch.setattr(os, "fsync", syncing)
    Registry(root).publish(judged(0), "support")
    monkeypatch.undo()
    assert named == set(folders)


def test_the_grace_of_a_version_begins_when_it_is_retired(tmp_path: Path, judged: Judged) -> None:
    registry = Registry(tmp_path / "registry")
    one = registry.publish(judged(0), "support")
    registry.publish(judged(1), "support")
    for path in (tmp_path / "registry").rglob("*"):
        os.utime(path, (1, 1))
    registry.retire("support", one.short)
    assert registry.collect(grace=1)[0] == []
    assert registry.collect(grace=0)[0] == [one.digest]


def test_a_first_publication_killed_leaves_a_place_for_another(tmp_path: Path, judged: Judged) -> None:
    place = tmp_path / "registry"
    place.mkdir()
    (place / ".postil-tmp-registry.json-1-killed").write_text("{")
    (place / ".lock").touch()
    assert Registry(place).publish(judged(), "support").moved
    assert {path.name for path in place.iterdir()} == {".lock", "blobs", "names", "registry.json", "versions"}


def test_a_torn_log_is_mended(tmp_path: Path) -> None:
    catalog = DirectoryCatalog(tmp_path / "registry", bool)
    catalog.commit("support", 0, moved(A, sentence="passed: größer"), "somebody")
    catalog.commit("support", 1, [Act(action="override", reason="why"), *moved(B)], "somebody")
    log = tmp_path / "registry/names/support/log.jsonl"
    whole = log.read_bytes()
    events = catalog.events("support")
    assert len(events) == 3
    second = whole.index(b"\n") + 1
    for cut in range(second, len(whole)):
        log.write_bytes(whole[:cut])
        assert catalog.events("support") == events
    catalog.commit("support", 3, moved(A, "rollback"), "somebody")
    assert log.read_bytes().startswith(whole)
    assert [event.action for event in catalog.events("support")] == ["publish", "override", "publish", "rollback"]
    log.write_bytes(whole[:second] + b'{"half": \n' + whole[second:])
    with pytest.raises(Corrupt, match=r"log.jsonl, line 2: no event"):
        catalog.events("support")
    with pytest.raises(Corrupt, match="line 2"):
        catalog.commit("support", 4, moved(B, "promote"), "somebody")
    assert catalog.state("support").live == {"live": A}


def test_a_broken_state_is_named(tmp_path: Path) -> None:
    catalog = DirectoryCatalog(tmp_path / "registry", bool)
    catalog.commit("support", 0, moved(A), "somebody")
    state = tmp_path / "registry/names/support/state.json"
    for text, fault in (("{}", "'state' is required"), ("{", "Expecting"), ("[]", "expected a mapping")):
        state.write_text(text)
        with pytest.raises(Corrupt, match=rf"state.json is no state of a name .*{fault}.*; restore it from a copy"):
            catalog.state("support")
        with pytest.raises(Corrupt):  # nothing is collected where nobody knows what is needed
            catalog.collect(float("inf"), lambda keep: 0)


def test_a_writer_waits_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = DirectoryCatalog(tmp_path / "registry", bool)
    catalog.commit("support", 0, moved(A), "somebody")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "registry/.lock"], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    monkeypatch.setattr("postil.registry.directory.PATIENCE", 0.05)
    with pytest.raises(Unavailable, match="another process has been writing") as fault:
        catalog.commit("support", 1, moved(B), "somebody")
    assert fault.value.exit_code == 4
    assert catalog.state("support").live == {"live": A}  # a reader does not wait
    holder.kill()
    holder.wait()
    holder.stdout.close()
    catalog.commit("support", 1, moved(B), "somebody")


def test_bytes_are_copied_while_another_holds_the_lock(
    tmp_path: Path, judged: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is slow needs no lock: only the commit waits."""
    registry = Registry(tmp_path / "registry")
    registry.set_policy("support", Policy(gate="general.nats < base + 1"))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "registry/.lock"], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    monkeypatch.setattr("postil.registry.directory.PATIENCE", 0.05)
    monkeypatch.setattr(registry.catalog, "make", lambda: None)
    with pytest.raises(Unavailable):
        registry.publish(judged(0), "support")
    assert len(list((tmp_path / "registry/blobs").iterdir())) == 4
    holder.kill()
    holder.wait()
    holder.stdout.close()


def test_errors_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        DirectoryCatalog(tmp_path / "nothing", bool).check()
    for kind, code in ((NotFound, 2), (Corrupt, 2), (RegistryConflict, 4), (Unavailable, 4), (RegistryError, 2)):
        assert issubclass(kind, RegistryError)
        assert kind.exit_code == code
