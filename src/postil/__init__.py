"""The public names of postil, each imported on first use: `import postil` alone loads no torch."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

__version__ = version("postil")

__all__ = [
    "AdaptedModel",
    "Adapter",
    "AdapterError",
    "Base",
    "BaseModelError",
    "DataError",
    "Engine",
    "InternalError",
    "LoraConfig",
    "PostilError",
    "RecipeError",
    "Request",
    "RequestError",
    "RunError",
    "StorageError",
    "__version__",
    "attach",
    "detach",
    "export_merged",
    "load_adapter",
    "load_base",
    "load_data",
    "merge",
    "save_adapter",
    "train",
    "unmerge",
]

_HOME = {
    "AdaptedModel": "postil.adapter",
    "Adapter": "postil.adapter",
    "AdapterError": "postil.errors",
    "Base": "postil.base",
    "BaseModelError": "postil.errors",
    "DataError": "postil.errors",
    "Engine": "postil.engine",
    "InternalError": "postil.errors",
    "LoraConfig": "postil.adapter.config",
    "PostilError": "postil.errors",
    "RecipeError": "postil.errors",
    "Request": "postil.engine",
    "RequestError": "postil.errors",
    "RunError": "postil.errors",
    "StorageError": "postil.errors",
    "attach": "postil.adapter.attach",
    "detach": "postil.adapter.attach",
    "export_merged": "postil.adapter.merge",
    "load_adapter": "postil.adapter.peft_files",
    "load_base": "postil.base",
    "load_data": "postil.data",
    "merge": "postil.adapter.merge",
    "save_adapter": "postil.adapter.peft_files",
    "train": "postil.training",
    "unmerge": "postil.adapter.merge",
}

if TYPE_CHECKING:
    from postil.adapter import AdaptedModel, Adapter
    from postil.adapter.attach import attach, detach
    from postil.adapter.config import LoraConfig
    from postil.adapter.merge import export_merged, merge, unmerge
    from postil.adapter.peft_files import load_adapter, save_adapter
    from postil.base import Base, load_base
    from postil.data import load_data
    from postil.engine import Engine, Request
    from postil.errors import (
        AdapterError,
        BaseModelError,
        DataError,
        InternalError,
        PostilError,
        RecipeError,
        RequestError,
        RunError,
        StorageError,
    )
    from postil.training import train
else:

    def __getattr__(name: str) -> object:
        """Import the module that a public name lives in and keep the name here (PEP 562)."""
        if name not in _HOME:
            raise AttributeError(f"module 'postil' has no attribute {name!r}")
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
