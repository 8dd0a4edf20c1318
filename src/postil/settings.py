"""Validated settings: pydantic models whose errors name the key, what came and what is allowed."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from postil.errors import PostilError, RecipeError, listed, nearest


class Settings(BaseModel):
    """A frozen pydantic model that knows its keys and raises one clear PostilError.

    Subclasses may set `error` (the PostilError raised) and `where` (how messages name the thing).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    error: ClassVar[type[PostilError]] = RecipeError
    where: ClassVar[str] = "settings"

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as problem:
            raise type(self).error(explain(problem, type(self))) from None

    @classmethod
    def parse(cls, values: object) -> Any:
        """Validate a mapping that came from a file; raises `cls.error` as the constructor does."""
        if not isinstance(values, dict):
            raise cls.error(f"{cls.where}: expected a mapping of keys, found {type(values).__name__}")
        return cls(**{str(key): value for key, value in values.items()})


def explain(problem: ValidationError, model: type[Settings]) -> str:
    """One sentence for a pydantic error: which key, what came, what is allowed, the nearest known key."""
    parts = []
    for error in problem.errors(include_url=False):
        location = ".".join(str(part) for part in error["loc"] if not str(part).startswith("function-"))
        if error["type"] == "extra_forbidden":
            known = _keys_at(model, error["loc"][:-1])
            near = nearest(str(error["loc"][-1]), known)
            parts.append(f"unknown key {location!r}{near or f'; known: {listed(known, 24)}'}")
        elif error["type"] == "missing":
            parts.append(f"{location!r} is required and was not given")
        else:
            message = error["msg"].removeprefix("Value error, ").removeprefix(f"{location}: ")
            came = "" if isinstance(error["input"], dict) else f" (found {error['input']!r})"
            parts.append(f"{location}: {message}{came}" if location else message)
    return f"{model.where}: " + "; ".join(dict.fromkeys(parts))


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in location:
        field = getattr(current, "model_fields", {}).get(part)
        if field is None:
            return []
        current = field.annotation
    return list(getattr(current, "model_fields", {}))
