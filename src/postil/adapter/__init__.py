"""Adapters: configuration, the resident bank, attaching, merging, and PEFT's file format."""

from postil.adapter.adapter import Adapter
from postil.adapter.attach import attach, check_base, detach
from postil.adapter.config import LoraConfig
from postil.adapter.model import AdaptedModel
from postil.adapter.targets import Coverage, find_targets

__all__ = ["AdaptedModel", "Adapter", "Coverage", "LoraConfig", "attach", "check_base", "detach", "find_targets"]
