"""Where postil keeps what it fetched or computed: one directory of the user's."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_directory() -> Path:
    """`$POSTIL_HOME`, or the platform's cache directory for postil (not created here)."""
    home = os.environ.get("POSTIL_HOME")
    if home:
        return Path(home).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "postil"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "postil"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "postil"


def bases_directory() -> Path:
    """Where fetched bases live, one HF directory each."""
    return cache_directory() / "bases"
