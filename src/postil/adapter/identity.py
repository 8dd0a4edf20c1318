"""What an adapter is by its bytes, and its card in postil.json, changed without touching them."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from postil.adapter.adapter import Adapter
from postil.adapter.peft_files import CONFIG, OWN, VERSION, WEIGHTS, load_adapter, own_text, save_adapter
from postil.errors import AdapterError
from postil.files import sha256_file, write_text


def adapter_sha256(adapter: Adapter | str | Path) -> str:
    """SHA-256 (hex) over adapter_model.safetensors and adapter_config.json: what decides an adapter's answers.

    A directory's own bytes; an Adapter in memory counts as what `save_adapter` would write of it. postil.json and
    the model card are not in it, so a score card can be added. Raises AdapterError where a file is missing.
    """
    if isinstance(adapter, Adapter):
        with tempfile.TemporaryDirectory(prefix="postil-") as place:
            return adapter_sha256(save_adapter(adapter, Path(place) / "adapter"))
    files = {}
    for name in (WEIGHTS, CONFIG):
        file = Path(adapter) / name
        if not file.is_file():
            raise AdapterError(f"{adapter} holds no {name}; name a directory that PEFT or postil wrote, whole")
        files[name] = sha256_file(file)
    return combined_sha256(files)


def combined_sha256(files: Mapping[str, str]) -> str:
    """As adapter_sha256, from the SHA-256 of each file by its name, so that large files are not read again."""
    digest = hashlib.sha256(b"postil adapter 1")
    for name in (WEIGHTS, CONFIG):
        digest.update(f"\n{name} {files[name]}".encode())
    return digest.hexdigest()


def published(directory: str | Path) -> bool:
    """Whether an adapter directory is a registry's version, which never changes."""
    return (Path(directory) / VERSION).is_file()


def update_card(directory: str | Path, **parts: Any) -> None:
    """Put `parts` (plain JSON values) into the card in postil.json, atomically; a key that was there is replaced.

    An adapter made elsewhere gets a postil.json. Weights and configuration are not written. Raises what
    load_adapter raises, AdapterError for a published version, and StorageError.
    """
    if published(directory):
        raise AdapterError(f"{directory} is a published version, which never changes; publish the adapter again")
    adapter = load_adapter(directory)
    adapter.card |= parts
    write_text(Path(directory) / OWN, own_text(adapter))
