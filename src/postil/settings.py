"""Validated settings: pydantic models whose errors name the key and what is allowed; YAML and KEY=VALUE into them."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import yaml
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


class _Loader(yaml.SafeLoader):
    """YAML without its dates: a run named 2024-05-01 is a name."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str) -> Any:
    """The plain value that a YAML text holds; dates stay text. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def with_settings(values: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """A mapping with `training.learning_rate=2e-4` and the like set; values are read as YAML."""
    out: dict[str, Any] = copy.deepcopy(values)
    for setting in settings:
        key, mark, text = setting.partition("=")
        if not mark or not key:
            raise RecipeError(f"--set {setting}: write key=value, for example --set training.learning_rate=2e-4")
        place = out
        *parents, last = key.split(".")
        for parent in parents:
            inner = place.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise RecipeError(f"--set {setting}: {parent} is a value, not a group of keys")
            place = inner
        try:
            place[last] = _number(read_yaml(text))
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {setting}: {text!r} is no YAML value: {' '.join(str(error).split())}") from None
    return out


def _number(value: Any) -> Any:
    """YAML 1.1 reads 2e-4 as text; a user means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
