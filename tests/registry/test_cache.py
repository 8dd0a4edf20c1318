"""Versions in the user's cache: fetched once, not read again while their stamps hold, fetched anew when touched."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from postil.adapter.peft_files import load_adapter
from postil.errors import AdapterError, Corrupt, StorageError, Unavailable
from postil.registry import Registry
from postil.registry.cache import IDLE, versions_directory
from published import Failing

Judged = Callable[..., Path]

FETCHER = """
import sys
from postil.registry import Registry
print(Registry(sys.argv[1]).resolve("support"))
"""


@pytest.fixture
def published(registry: Registry, judged: Judged) -> Path:
    """The directory of a published version in the cache."""
    registry.publish(judged(0), "support")
    return registry.resolve("support")


def test_it_is_fetched_once(registry: Registry, published: Path) -> None:
    """Without a blob store that answers, which is as good as without reading a byte."""
    silent = Registry(registry.catalog, Failing(registry.blobs, fetches=0))
    assert silent.resolve("support") == published
    assert silent.load("support").tensors
    assert published.parent == versions_directory()


def changed(file: Path, edit: Callable[[bytes], bytes]) -> None:
    """Edit a file in place and give it its old times."""
    facts = file.stat()
    file.write_bytes(edit(file.read_bytes()))
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "postil.json", "version.json"])
@pytest.mark.parametrize(
    "edit", [lambda text: text[:-3] + bytes([text[-3] ^ 1]) + text[-2:], lambda text: text[:-1], lambda text: b""]
)
def test_what_was_touched_is_fetched_again(
    registry: Registry, published: Path, file: str, edit: Callable[[bytes], bytes]
) -> None:
    before = (published / file).read_bytes()
    changed(published / file, edit)
    assert (registry.resolve("support") / file).read_bytes() == before
    (published / file).unlink()
    assert (registry.resolve("support") / file).read_bytes() == before
    replaced = published / "copy"
    replaced.write_bytes(before)
    os.replace(replaced, published / file)
    with pytest.raises(Unavailable):  # another inode is not trusted either
        Registry(registry.catalog, Failing(registry.blobs, fetches=0)).resolve("support")


def test_what_changes_while_it_is_read_is_not_returned(
    registry: Registry, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(directory: Path) -> object:
        adapter = load_adapter(directory)
        changed(directory / "postil.json", lambda text: text)
        return adapter

    monkeypatch.setattr("postil.adapter.peft_files.load_adapter", read)
    with pytest.raises(Corrupt, match="was changed while it was read; run this again"):
        registry.load("support")


def test_a_registrys_damage_does_not_reach_what_was_fetched(
    registry: Registry, published: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "registry/blobs" / registry.version("support").files["adapter_model.safetensors"]
    weights.write_bytes(b"damaged")
    assert registry.load("support").tensors  # the bytes that were published
    assert len(registry.verify()) == 1
    with pytest.raises(Corrupt, match="was changed after it was published"):
        Registry(registry.catalog, registry.blobs, cache=tmp_path / "elsewhere").load("support")


def test_a_version_in_the_cache_is_not_written_to(registry: Registry, published: Path) -> None:
    from postil.adapter.identity import update_card

    with pytest.raises(AdapterError, match="is a published version, which never changes"):
        update_card(published, note="x")


def test_several_processes_fetch_it_at_once(registry: Registry, judged: Judged, tmp_path: Path) -> None:
    registry.publish(judged(0), "support")
    started = [
        subprocess.Popen([sys.executable, "-c", FETCHER, tmp_path / "registry"], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    found = {process.communicate(timeout=120)[0] for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert found == {f"{registry.resolve('support')}\n"}
    assert load_adapter(registry.resolve("support")).tensors


def test_what_a_killed_process_left_goes(registry: Registry, judged: Judged) -> None:
    version = registry.publish(judged(0), "support")
    place = versions_directory()
    left = place / f".postil-tmp-{version.digest}-1-killed"
    left.mkdir(parents=True)
    (left / "adapter_model.safetensors").write_bytes(b"half")
    half = place / version.digest
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    assert registry.load("support").tensors
    assert not left.exists()


def test_what_nobody_asks_for_leaves_the_cache(registry: Registry, judged: Judged) -> None:
    old, kept, new = (registry.publish(judged(seed), f"name{seed}") for seed in range(3))
    for name in ("name0", "name1"):
        registry.resolve(name)
        long_ago = time.time() - (IDLE + 1) * 86400
        os.utime(versions_directory() / f"{registry.version(name).digest}.json", (long_ago, long_ago))
    registry.resolve("name1")
    registry.resolve("name2")
    left = {path.name for path in versions_directory().iterdir() if path.is_dir()}
    assert left == {kept.digest, new.digest}
    assert registry.resolve("name0").name == old.digest


def test_a_cache_that_cannot_be_written(registry: Registry, judged: Judged, tmp_path: Path) -> None:
    registry.publish(judged(0), "support")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"could not be written .*set POSTIL_HOME"):
        Registry(registry.catalog, registry.blobs, cache=tmp_path / "file/versions").resolve("support")
