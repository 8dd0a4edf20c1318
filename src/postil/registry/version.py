"""A version: the digest over an adapter's files and its base's fingerprint, and what a catalog keeps of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from postil.errors import JudgeError, PostilError, RegistryError
from postil.files import sha256_file
from postil.judging.card.model import ScoreCard
from postil.settings import Settings

MANIFEST = "version.json"  # postil.adapter.identity knows it too, without which this module imports fast
KEPT = ("adapter_config.json", "adapter_model.safetensors", "postil.json", "README.md")  # what a version consists of
_FILE, _DIGEST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}"), re.compile(r"[0-9a-f]{64}")
SHORT = 12  # digits of a digest that are shown
MEND = "publish the adapter again to restore it, or promote another version"


class Manifest(Settings):
    """version.json: the base's fingerprint and the SHA-256 of each file of the version, by name."""

    where: ClassVar[str] = MANIFEST
    error: ClassVar[type[PostilError]] = RegistryError

    format: Literal[1] = 1
    base: dict[str, str]
    files: dict[str, str]

    @field_validator("files")
    @classmethod
    def _plain(cls, files: dict[str, str]) -> dict[str, str]:
        for name, digest in files.items():
            if not _FILE.fullmatch(name) or not _DIGEST.fullmatch(digest):
                raise ValueError(f"{name!r} with the digest {digest!r} is no file of a version")
        return files

    @property
    def digest(self) -> str:
        """The version: SHA-256 (hex) over base, names and contents; JSON keeps the fields apart."""
        return _sha256(["postil version 1", sorted(self.base.items()), sorted(self.files.items())])


class Record(Settings):
    """What a catalog keeps of a version, without its bytes: the manifest, and the score card to be asked again."""

    where: ClassVar[str] = "version"
    error: ClassVar[type[PostilError]] = RegistryError

    manifest: Manifest
    card: dict[str, Any] | None = None

    @property
    def score_card(self) -> ScoreCard | None:
        """The card, None where there is none. Raises JudgeError for one that this postil cannot read."""
        if self.card is None:
            return None
        try:
            card: ScoreCard = ScoreCard.parse(self.card)
        except JudgeError as problem:
            raise JudgeError(
                f"version {short(self.manifest.digest)}: {problem}; judge its adapter again and publish it anew"
            ) from None
        return card

    @property
    def seal(self) -> str:
        """SHA-256 over all of it, by which a changed byte is found."""
        return _sha256(["postil record 1", self.manifest.digest, self.card])


def _sha256(fields: list[Any]) -> str:
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def digests_of(directory: Path) -> dict[str, str]:
    """The SHA-256 of each file of an adapter directory that a version keeps, of those that are there.

    Raises RegistryError for one that cannot be read.
    """
    try:
        return {name: sha256_file(directory / name) for name in KEPT if (directory / name).is_file()}
    except OSError as problem:
        raise RegistryError(f"{problem.filename or directory} cannot be read ({problem.strerror})") from None


def named(files: Mapping[str, str], digest: str) -> str:
    """The name that a version's file with this digest has."""
    return next((name for name, found in files.items() if found == digest), digest)


def short(version: str | None) -> str:
    """The first digits of a version, as they are shown."""
    return version[:SHORT] if version else "nothing"
