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
    "AnswerError",
    "Base",
    "BaseModelError",
    "Corrupt",
    "DataError",
    "Engine",
    "GateError",
    "InternalError",
    "JudgeError",
    "JudgeOptions",
    "LoraConfig",
    "NotFound",
    "PostilError",
    "RecipeError",
    "Refused",
    "Registry",
    "RegistryConflict",
    "RegistryError",
    "Request",
    "RequestError",
    "RunError",
    "ScoreCard",
    "StorageError",
    "Unavailable",
    "__version__",
    "attach",
    "detach",
    "export_merged",
    "judge",
    "load_adapter",
    "load_base",
    "load_data",
    "merge",
    "plan",
    "publish",
    "save_adapter",
    "shrink",
    "spectrum",
    "train",
    "unmerge",
]

_HOME = {
    "AdaptedModel": "postil.adapter",
    "Adapter": "postil.adapter",
    "AdapterError": "postil.errors",
    "AnswerError": "postil.errors",
    "Base": "postil.base",
    "BaseModelError": "postil.errors",
    "Corrupt": "postil.errors",
    "DataError": "postil.errors",
    "Engine": "postil.engine",
    "GateError": "postil.errors",
    "InternalError": "postil.errors",
    "JudgeError": "postil.errors",
    "JudgeOptions": "postil.judging.options",
    "LoraConfig": "postil.adapter.config",
    "NotFound": "postil.errors",
    "PostilError": "postil.errors",
    "RecipeError": "postil.errors",
    "Refused": "postil.errors",
    "Registry": "postil.registry",
    "RegistryConflict": "postil.errors",
    "RegistryError": "postil.errors",
    "Request": "postil.engine",
    "RequestError": "postil.errors",
    "RunError": "postil.errors",
    "ScoreCard": "postil.judging.card.model",
    "StorageError": "postil.errors",
    "Unavailable": "postil.errors",
    "attach": "postil.adapter.attach",
    "detach": "postil.adapter.attach",
    "export_merged": "postil.adapter.export",
    "judge": "postil.judging.judge",
    "load_adapter": "postil.adapter.peft_files",
    "load_base": "postil.base",
    "load_data": "postil.data",
    "merge": "postil.adapter.merge",
    "plan": "postil.planning.plan",
    "publish": "postil.registry",
    "save_adapter": "postil.adapter.peft_files",
    "shrink": "postil.adapter.shrink",
    "spectrum": "postil.adapter.spectrum",
    "train": "postil.training",
    "unmerge": "postil.adapter.merge",
}

if TYPE_CHECKING:
    from postil.adapter import AdaptedModel, Adapter
    from postil.adapter.attach import attach, detach
    from postil.adapter.config import LoraConfig
    from postil.adapter.export import export_merged
    from postil.adapter.merge import merge, unmerge
    from postil.adapter.peft_files import load_adapter, save_adapter
    from postil.adapter.shrink import shrink
    from postil.adapter.spectrum import spectrum
    from postil.base import Base, load_base
    from postil.data import load_data
    from postil.engine import Engine, Request
    from postil.errors import (
        AdapterError,
        AnswerError,
        BaseModelError,
        Corrupt,
        DataError,
        GateError,
        InternalError,
        JudgeError,
        NotFound,
        PostilError,
        RecipeError,
        Refused,
        RegistryConflict,
        RegistryError,
        RequestError,
        RunError,
        StorageError,
        Unavailable,
    )
    from postil.judging.card.model import ScoreCard
    from postil.judging.judge import judge
    from postil.judging.options import JudgeOptions
    from postil.planning.plan import plan
    from postil.registry import Registry, publish
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
