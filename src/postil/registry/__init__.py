"""Published adapters: versions by their bytes, aliases that move in one step, a gate at the door, roll-back."""

from __future__ import annotations

from postil.registry.registry import Registry, Version, publish, resolve_adapter

__all__ = ["Registry", "Version", "publish", "resolve_adapter"]
