"""The command that reproduces a score card, from what `judge` was given."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postil.base import Base
from postil.data.shipped import SHIPPED
from postil.judging.options import SCALES, JudgeOptions
from postil.judging.sets.read import From

_FLAGS = {"shots": "--shots", "null": "--null", "scope": "--scope"}


@dataclass(frozen=True, slots=True)
class Sources:
    """The sets that `judge` was given, each a file or rows in memory."""

    target: From | None = None
    general: From | None = SHIPPED
    chat: From | None = SHIPPED
    choices: From | None = None
    pairs: From | None = None
    train: From | None = None
    leaks: From | None = None

    def any_set(self) -> bool:
        """Whether there is anything to judge on."""
        return any(one is not None for one in (self.target, self.general, self.chat, self.choices, self.pairs))

    def flags(self) -> list[str]:
        """The flags that give them; what is as by default has none."""
        named = {"target": self.target, "choices": self.choices, "pairs": self.pairs, "train": self.train,
                 "leakage": self.leaks}  # fmt: skip
        words = [word for flag, one in named.items() if one is not None for word in (f"--{flag}", _word(one, "ROWS"))]
        for flag, one in (("--general", self.general), ("--chat", self.chat)):
            if not (isinstance(one, str) and one == SHIPPED):
                words += [flag, "none" if one is None else _word(one, "ROWS")]
        return words


def command_of(judged: object, base: Base, sources: Sources, options: JudgeOptions) -> str:
    """`postil judge …` in the shell's words. Rows given in memory show as ROWS, an adapter in memory as ADAPTER."""
    words = ["postil", "judge", _word(judged, "ADAPTER"), "--base", base.source]
    words += ["--dtype", str(base.dtype).removeprefix("torch.")]
    words += ["--quant", "nf4"] if base.quantised else []
    words += sources.flags()
    changed = options.model_dump(mode="json", exclude_defaults=True)
    for key in ("metrics", "slices"):
        if key in changed:
            words += [f"--{key}", ",".join(changed.pop(key))]
    for key, flag in _FLAGS.items():
        if key in changed:
            words += [flag, str(changed.pop(key))]
    if tuple(changed.get("curve", ())) == SCALES:
        del changed["curve"]
        words.append("--curve")
    for key, value in _flat("", changed):
        words += ["--set", f"{key}={json.dumps(value, ensure_ascii=False)}"]
    return shlex.join(words)


def _flat(prefix: str, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value and key != "metric_options":
            out += _flat(f"{prefix}{key}.", value)
        else:
            out.append((f"{prefix}{key}", value))
    return out


def _word(given: object, otherwise: str) -> str:
    if isinstance(given, str | Path):
        return str(given)
    return given.source if isinstance(given, Base) else otherwise
