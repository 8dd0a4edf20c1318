"""Engine: requests to answers, with rows of different adapters and of the bare base in one batch."""

from postil.engine.engine import Engine
from postil.engine.request import Answer, Request, unbroken

__all__ = ["Answer", "Engine", "Request", "unbroken"]
