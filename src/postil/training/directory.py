"""A run's directory: one trainer at a time, the recipe it was begun with, and nothing of the user's overwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import yaml

from postil.errors import PostilError, RecipeError, RunError, StorageError, listed
from postil.files import remove_leftovers, write_text
from postil.settings import read_yaml

RECIPE = "recipe.yaml"
_OWN = (".lock", RECIPE, "log.jsonl", "checkpoints")  # what a run's directory has from its beginning


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises RecipeError that names the file and the line."""
    try:
        value = read_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: expected keys such as base, data, out; found {type(value).__name__}")
    return value


def check_foreign(out: Path) -> None:
    """Raise RunError where `out` holds files and none that a run begins with."""
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in _OWN):
        raise RunError(f"{out} holds files that are of no run; choose another --out, so that nothing is mixed up")


@contextmanager
def only_trainer(directory: Path | None) -> Iterator[None]:
    """One process at a time trains in a run directory; what killed ones left there is removed. Nests."""
    if directory is None:
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{directory} could not be made ({error.strerror}); choose another --out") from error
    try:
        with filelock.FileLock(directory / ".lock", timeout=0, is_singleton=True):
            remove_leftovers(directory)
            yield
    except filelock.Timeout:
        raise RunError(f"another process is training in {directory}; wait for it or choose another --out") from None


def keep_recipe(out: Path, fields: dict[str, Any], normal: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Put a run's recipe (`fields`, every key) into its directory, or find it there.

    normal: makes of a recipe's mapping the one with every key, or raises RecipeError. A recipe.yaml that was written
    by hand is left as it is. Raises RunError where a run with checkpoints, or a hand-written file, says otherwise.
    """
    kept = out / RECIPE
    if kept.is_file():
        before, fault = None, ""
        try:
            before = normal(read_recipe(kept))
        except PostilError as error:
            fault = f": {error}"
        if before == fields:
            return
        said = fault if before is None else _differing(before, fields)
        if any((out / "checkpoints").glob("step-*")):
            raise RunError(
                f"{out} holds a run of another recipe{said}; choose another --out or remove that directory"
            )
        if before is None or kept.read_text(encoding="utf-8") != _text(before):
            raise RunError(
                f"{kept} is not this run's{said}; it is not overwritten: change it there, or choose another --out"
            )
    write_text(kept, _text(fields))


def _text(fields: dict[str, Any]) -> str:
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _differing(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Which keys a run's recipe has otherwise, with both values."""
    old, new = _flat(before), _flat(now)
    keys = [key for key in dict.fromkeys((*new, *old)) if old.get(key) != new.get(key)]
    return f" ({listed([f'{key}: {old.get(key)} there, {new.get(key)} here' for key in keys])})"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe's values by dotted key."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
