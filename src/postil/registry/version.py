"""A version: the digest over an adapter's files and its base's fingerprint, and every byte checked against it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Literal

from postil.errors import PostilError, RegistryError
from postil.files import sha256_file
from postil.settings import Settings

MANIFEST = "version.json"  # postil.adapter.identity knows it too, without which this module imports fast
KEPT = ("adapter_config.json", "adapter_model.safetensors", "postil.json", "README.md")  # what a version consists of
SHORT = 12  # digits of a digest that are shown


class Manifest(Settings):
    """version.json: the base's fingerprint and the SHA-256 of each file of the version, by name."""

    where: ClassVar[str] = MANIFEST
    error: ClassVar[type[PostilError]] = RegistryError

    format: Literal[1] = 1
    base: dict[str, str]
    files: dict[str, str]

    @property
    def digest(self) -> str:
        """The version: SHA-256 (hex) over base, names and contents; JSON keeps the fields apart."""
        fields = ["postil version 1", sorted(self.base.items()), sorted(self.files.items())]
        text = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8")).hexdigest()


def digests_of(directory: Path) -> dict[str, str]:
    """The SHA-256 of each file of an adapter directory that a version keeps, of those that are there.

    Raises RegistryError for one that cannot be read.
    """
    try:
        return {name: sha256_file(directory / name) for name in KEPT if (directory / name).is_file()}
    except OSError as problem:
        raise RegistryError(f"{problem.filename or directory} cannot be read ({problem.strerror})") from None


def verified(directory: Path, digest: str) -> Manifest:
    """The manifest of a version on disk, every byte checked against `digest`.

    Raises RegistryError naming the file that was changed, cut short or removed.
    """
    mend = "publish the adapter again to restore it, or promote another version"
    file = directory / MANIFEST
    if not file.is_file():
        raise RegistryError(f"{directory} holds no {MANIFEST}: it is no version, or a part of one; {mend}")
    try:
        values: Any = json.loads(file.read_text(encoding="utf-8"))
        manifest: Manifest = Manifest.parse(values)
    except (ValueError, OSError) as problem:
        raise RegistryError(f"{file} cannot be read ({problem}); {mend}") from None
    if manifest.digest != digest:
        raise RegistryError(f"{file} was changed: it is not of version {digest[:SHORT]}; {mend}")
    for name, expected in manifest.files.items():
        try:
            found = sha256_file(directory / name)
        except OSError as problem:
            raise RegistryError(f"{directory / name} cannot be read ({problem.strerror}); {mend}") from None
        if found != expected:
            raise RegistryError(
                f"{directory / name} was changed after it was published: version {digest[:SHORT]} has other bytes; "
                f"{mend}"
            )
    return manifest
