"""Published adapters: versions by their bytes, aliases that move in one step by their policies, roll-back."""

from __future__ import annotations

from postil.registry.finding import Version
from postil.registry.policy import Policy
from postil.registry.registry import Registry, publish, resolve_adapter

__all__ = ["Policy", "Registry", "Version", "publish", "resolve_adapter"]
