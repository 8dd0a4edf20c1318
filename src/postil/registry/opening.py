"""Opens what a registry stands on, by the place that --registry or POSTIL_REGISTRY names: a directory, today."""

from __future__ import annotations

import os
from pathlib import Path

from postil.errors import RegistryError
from postil.registry.blobs import DirectoryBlobs
from postil.registry.directory import DirectoryCatalog
from postil.registry.ports import Blobs, Catalog


def opened(place: str | Path | Catalog, blobs: Blobs | None = None) -> tuple[Catalog, Blobs]:
    """The catalog and the blob store of a place; a catalog goes with a blob store of its own.

    Raises RegistryError for a URL of a kind that this postil does not know.
    """
    if isinstance(place, str | os.PathLike):
        root = _directory(os.fspath(place))
        stored = DirectoryBlobs(root) if blobs is None else blobs
        return DirectoryCatalog(root, stored.has), stored
    if blobs is None:
        raise RegistryError("a catalog was given without a blob store; give both: Registry(catalog, blobs)")
    return place, blobs


def _directory(place: str) -> Path:
    scheme, mark, rest = place.partition("://")
    if not mark:
        return Path(place)
    if scheme == "file" and rest.startswith("/"):
        return Path(rest)
    raise RegistryError(
        f"--registry names a place of the kind {scheme}://, and this postil keeps registries in directories only; "
        "name a directory"
    )
