"""The store under fire: two processes at one alias, kill -9 at every step of a publication, a torn log."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from postil.errors import RegistryError
from postil.registry import Registry
from postil.registry.log import Event, stack
from postil.registry.store import DirectoryStore

Judged = Callable[..., Path]
A, B = "a" * 64, "b" * 64

RACER = """
import sys, time
from pathlib import Path
from postil.errors import RegistryError
from postil.registry.store import DirectoryStore

root, mine = Path(sys.argv[1]), sys.argv[2]
store = DirectoryStore(root / "registry")
(root / f"ready-{mine[0]}").touch()
while not (root / "go").exists():
    time.sleep(0.001)
for number in range(30):
    try:
        store.swap(f"name{number}", "live", None, mine, action="publish")
        print(number)
    except RegistryError as refusal:
        assert "another process moved it meanwhile" in str(refusal), refusal
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
from postil.registry import Registry

root, adapter = Path(sys.argv[1]), Path(sys.argv[2])
counted = [(os, "replace"), (os, "fsync"), (shutil, "copyfile"), (shutil, "rmtree")]

def publish_and_die(place, at):
    "Publish; kill -9 before the call number `at` of those counted."
    left = at
    def dying(real):
        def call(*words, **more):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*words, **more)
        return call
    for module, name in counted:
        setattr(module, name, dying(getattr(module, name)))
    Registry(place).publish(adapter, "support")
    os._exit(0)

at, found = 0, []
while True:
    at += 1
    place = Path(shutil.copytree(root / "registry", root / f"killed-{at}"))
    child = os.fork()
    if child == 0:
        publish_and_die(place, at)
    ended = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(ended):
        break
    found.append(Registry(place).version("support").digest)  # verifies every byte
print(json.dumps([found, os.WEXITSTATUS(ended)]))
"""


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
    store = DirectoryStore(tmp_path / "registry")
    for number in range(30):
        assert store.aliases(f"name{number}") == {"live": A if number in won[0] else B}
        assert len(store.log(f"name{number}")) == 1


def test_a_registry_that_appears_while_it_is_looked_for_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, looked, listed = DirectoryStore(tmp_path / "registry"), Path.is_dir, Path.iterdir

    def is_dir(path: Path) -> bool:
        found = looked(path)
        if path == store.root:
            path.mkdir(exist_ok=True)  # another process's, its marker not yet written
        return found

    def iterdir(path: Path) -> Iterator[Path]:
        if path != store.root or looked(path):
            return listed(path)
        path.mkdir()
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    monkeypatch.setattr(Path, "iterdir", iterdir)
    store.check_own()
    assert looked(store.root)


def test_killed_at_any_step_it_is_the_old_or_the_new(tmp_path: Path, judged: Judged) -> None:
    registry = Registry(tmp_path / "registry")
    old = registry.publish(judged(0), "support").digest
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, judged(1)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found, ending = json.loads(done.stdout)
    new = registry.publish(judged(1), "support").digest
    assert ending == 0
    assert len(found) > 20
    assert found == sorted(found, key=[old, new].index)  # the old one up to one step, the new one from there on
    assert {found[0], found[-1]} == {old, new}
    for at, digest in enumerate(found, 1):
        killed = Registry(tmp_path / f"killed-{at}")
        assert [event.version for event in killed.history("support")] == [old, new][: 1 + (digest == new)]
        assert killed.publish(judged(1), "support").moved is (digest == old)
        assert killed.rollback("support").digest == old
        events = (killed.store.root / "aliases/support/log.jsonl").read_text().splitlines()
        assert [json.loads(line)["number"] for line in events] == [1, 2, 3]
        left = [path for path in killed.store.root.rglob("*") if ".postil-" in path.name]
        assert left == [], at


def test_a_first_publication_killed_leaves_a_place_for_another(tmp_path: Path, judged: Judged) -> None:
    place = tmp_path / "registry"
    place.mkdir()
    (place / ".postil-tmp-registry.json-1-killed").write_text("{")
    (place / ".lock").touch()
    assert Registry(place).publish(judged(), "support").moved
    assert {path.name for path in place.iterdir()} == {".lock", "aliases", "registry.json", "versions"}


def test_a_torn_log_is_mended(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "registry")
    store.swap("support", "live", None, A, action="publish", sentence="passed: größer")
    store.swap("support", "live", A, B, action="publish")
    log = tmp_path / "registry/aliases/support/log.jsonl"
    whole = log.read_bytes()
    events = store.log("support")
    second = whole.index(b"\n") + 1
    for cut in range(second, len(whole)):
        log.write_bytes(whole[:cut])
        assert store.log("support") == events
    store.swap("support", "live", B, A, action="rollback")
    assert log.read_bytes().startswith(whole)
    assert [event.action for event in store.log("support")] == ["publish", "publish", "rollback"]
    log.write_bytes(whole[:second] + b'{"half": \n' + whole[second:])
    with pytest.raises(RegistryError, match=r"log.jsonl, line 2: no event"):
        store.log("support")
    with pytest.raises(RegistryError, match="line 2"):
        store.swap("support", "live", A, B, action="promote")
    assert store.aliases("support") == {"live": A}


def test_compare_and_set(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "registry")
    with pytest.raises(RegistryError, match="support@live points at nothing and no longer at aaaaaaaaaaaa"):
        store.swap("support", "live", A, B, action="promote")
    assert store.aliases("support") == {}
    store.swap("support", "live", None, A, action="publish")
    with pytest.raises(RegistryError, match="points at aaaaaaaaaaaa and no longer at nothing"):
        store.swap("support", "live", None, B, action="publish")
    store.swap("support", "live", None, A, action="publish")  # it is there already
    (event,) = store.log("support")
    assert (event.number, event.version, event.before, event.action) == (1, A, None, "publish")
    store.record("support", "refuse", "live", B, gate="g", sentence="s")
    assert [(e.number, e.version, e.before) for e in store.log("support")] == [(1, A, None), (2, B, A)]
    assert store.aliases("support") == {"live": A}


def test_a_broken_alias_is_named(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "registry")
    store.swap("support", "live", None, A, action="publish")
    (tmp_path / "registry/aliases/support/live.json").write_text("{}")
    with pytest.raises(RegistryError, match=r"live.json is no alias .*'number' is required"):
        store.aliases("support")


def test_a_writer_waits_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DirectoryStore(tmp_path / "registry")
    store.swap("support", "live", None, A, action="publish")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "registry/.lock"], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    holder.stdout.readline()
    monkeypatch.setattr("postil.registry.store.PATIENCE", 0.05)
    with pytest.raises(RegistryError, match="another process has been writing"):
        store.swap("support", "live", A, B, action="publish")
    assert store.aliases("support") == {"live": A}  # a reader does not wait
    holder.kill()
    holder.wait()
    holder.stdout.close()
    store.swap("support", "live", A, B, action="publish")


def test_events_know_their_keys() -> None:
    with pytest.raises(RegistryError, match=r"log of the registry: .*unknown key 'versoin' .did you mean 'version'"):
        Event.parse({"number": 1, "action": "publish", "alias": "live", "versoin": A})


def test_a_log_restored_from_an_old_copy_still_knows_where_the_alias_is() -> None:
    def event(number: int, action: Any, version: str) -> Event:
        return Event(number=number, action=action, alias="live", version=version)

    whole = [event(1, "publish", "a"), event(2, "publish", "b"), event(3, "rollback", "a")]
    assert stack(whole, "live") == ["a"]
    assert stack([whole[0], whole[2]], "live") == ["a"]
    assert stack([whole[2]], "live") == ["a"]
    assert stack([event(1, "publish", "a"), event(2, "promote", "b"), event(3, "promote", "a")], "live") == [
        "a",
        "b",
        "a",
    ]
