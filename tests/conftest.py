"""Every test gets a home of its own and no network; `base` tests use the user's cache."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

import pytest
import torch


@pytest.fixture(autouse=True)
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """POSTIL_HOME is temporary unless the test is marked `base`; one thread: tiny models gain nothing from more."""
    torch.set_num_threads(1)
    if request.node.get_closest_marker("base") is None:
        monkeypatch.setenv("POSTIL_HOME", str(tmp_path / "home"))
