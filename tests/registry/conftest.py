"""Judged adapter directories, as small as they can be, the registries that they go into, and what these stand on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from cards import card, changed
from postil.adapter.identity import update_card
from postil.adapter.peft_files import save_adapter
from postil.registry import Registry
from postil.registry.blobs import DirectoryBlobs
from postil.registry.directory import DirectoryCatalog
from postil.registry.ports import Blobs, Catalog
from published import format_1, small


@pytest.fixture
def judged(tmp_path: Path) -> Callable[..., Path]:
    """judged(seed, nats=…, …): the directory of an adapter whose card fits its bytes; scope=…: what it is for."""

    def make(seed: int = 0, source: str = "sha256:base", scope: str = "assistant", **measures: Any) -> Path:
        place = save_adapter(small(seed, source), tmp_path / f"runs/{seed}/adapter")
        made = changed(card(bytes_of=place, source=source, **measures), scope=scope)
        update_card(place, score_card=made.model_dump(mode="json"))
        return place

    return make


@pytest.fixture
def unjudged(tmp_path: Path) -> Path:
    """An adapter directory without a score card."""
    return save_adapter(small(7), tmp_path / "unjudged/adapter")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A registry that does not exist yet."""
    return Registry(tmp_path / "registry")


@pytest.fixture(params=["directory", "directory that was of format 1"])
def ports(request: pytest.FixtureRequest, tmp_path: Path, judged: Callable[..., Path]) -> tuple[Catalog, Blobs]:
    """A catalog and its blob store, of every kind there is, to be asked the same."""
    root = tmp_path / "registry"
    if request.param != "directory":
        format_1(root, {"older": [judged(90), judged(91)]})
    blobs = DirectoryBlobs(root)
    return DirectoryCatalog(root, blobs.has), blobs


@pytest.fixture
def catalog(ports: tuple[Catalog, Blobs]) -> Catalog:
    """The catalog alone."""
    return ports[0]


@pytest.fixture
def blobs(ports: tuple[Catalog, Blobs]) -> Blobs:
    """The blob store alone; its registry is there."""
    ports[0].make()
    return ports[1]
