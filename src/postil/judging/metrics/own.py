"""A user's own measure: a function in a Python file, (answer, row) -> number, that the user names on purpose."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from postil.errors import JudgeError, nearest
from postil.judging.metrics.metric import Metric, Row, mean_of
from postil.judging.metrics.options import Given, OwnOptions, chosen
from postil.judging.metrics.wanted import means, wanted

PREFIX = "own."
_NAMED = re.compile(r"(?P<path>.+\.py):(?P<function>\w+)")


def is_own(name: str) -> bool:
    """Whether a metric's name means a function in a file: `path/to/file.py:function`."""
    return _NAMED.fullmatch(name) is not None


def own(name: str, given: Given) -> Metric:
    """The mean over rows of the user's function `path/to/file.py:function` (answer: str, row: dict) -> float.

    It is called own.FUNCTION, so that it is never taken for postil's measure of that name. A row for which it gives
    None is not counted, whatever the answer: an answer that cannot be read is wrong, and not a row less. The file is
    run, as the user asked. Raises JudgeError naming the file's line where it cannot be run, and the row where the
    function fails, gives no finite number, or None for one answer and not for another.
    """
    options = chosen(OwnOptions, given)
    function = _load(name)
    counted: dict[str, bool] = {}  # by row, as its first answer was

    def score(answer: str, row: Row) -> float | None:
        try:
            value = function(answer, dict(row))
            number = math.nan if isinstance(value, str) else float(0 if value is None else value)
        except (Exception, SystemExit) as problem:
            raise JudgeError(f"{name} failed: {_slip(problem, name)}") from None
        if not math.isfinite(number):
            raise JudgeError(f"{name} must give a finite number or None, and gave {value!r:.80}")
        counts = value is not None
        if counted.setdefault(json.dumps(row, sort_keys=True, default=str), counts) is not counts:
            raise JudgeError(
                f"{name} gives None for one answer to this row and a number for another, so base and adapter would "
                "be measured on other rows; give a number for an answer that cannot be read, and None only for a row "
                "that does not count"
            )
        return number if counts else None

    def look(rows: Sequence[Row]) -> list[str]:
        """The first row is tried, with an answer that is wanted and with an empty one."""
        for text in (wanted(rows[0])[0], ""):
            statistics([text], rows[:1])
        return []

    statistics = means(score)
    label = f"{PREFIX}{name.rpartition(':')[2]}"
    return Metric(label, options.better, options.unit, statistics, mean_of, look)


def _load(name: str) -> Callable[..., Any]:
    match = _NAMED.fullmatch(name)
    if match is None:
        raise JudgeError(f"{name!r} must have the form path/to/file.py:function")
    path = Path(match["path"])
    try:
        source = path.read_bytes()
    except OSError as problem:
        raise JudgeError(f"{path} could not be read ({problem.strerror}).") from None
    # Under a name of its own in sys.modules, which dataclasses need; nothing is written beside the user's file.
    module = ModuleType(f"postil_own_{hashlib.sha256(source).hexdigest()[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as problem:
        raise JudgeError(f"{path} could not be run: {_slip(problem, name)}") from None
    function = vars(module).get(match["function"])
    if not callable(function):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise JudgeError(f"{path} has no function {match['function']!r}{nearest(match['function'], known)}.")
    return function  # type: ignore[no-any-return]


def _slip(problem: BaseException, name: str) -> str:
    """`KeyError: 'x' (line 3)`: the error's first line and the last line of the user's file on its way."""
    path = name.rpartition(":")[0]
    lines = [frame.lineno for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == path]
    line = problem.lineno if isinstance(problem, SyntaxError) else lines[-1] if lines else None
    where = "" if line is None else f" (line {line})"
    if isinstance(problem, SyntaxError):
        return f"SyntaxError: {problem}{where}"
    told = "".join(traceback.format_exception_only(problem)).strip() or type(problem).__name__
    return f"{told.splitlines()[0]}{where}"
