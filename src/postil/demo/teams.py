"""The demo's three teams: where their rows lie, how their notes are trained, and by which measure they are judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from postil.data import DataOptions
from postil.demo import house_tone

PLAIN = DataOptions(format="raw")  # prompt, line break, completion: no chat template


@dataclass(frozen=True, slots=True)
class Team:
    """One team. measure: in words; metric: as `postil judge --metrics` takes it, options: what it is told; training:
    what is its own among the settings; rows: how its files are read; scope: what its note is for."""

    name: str
    title: str
    measure: str
    metric: str
    training: Mapping[str, Any]
    rows: DataOptions = field(default_factory=DataOptions)
    options: Mapping[str, Any] = field(default_factory=dict)
    scope: Literal["assistant", "task"] = "assistant"

    def file(self, split: Literal["train", "test"]) -> Path:
        """The file of a split, as it ships with postil."""
        return Path(str(files("postil.data") / "samples" / "demo" / self.name / f"{split}.jsonl"))


TEAMS = (
    Team("tools", "Facilities: requests become tool calls", "exact calls, %", "exact_calls",
         {"learning_rate": 5e-3, "kl_rows": 2}, PLAIN, scope="task"),
    Team("tone", "Grey Heron Ferries: the house tone", "rules kept, %", f"{house_tone.__file__}:house_tone",
         {"learning_rate": 4e-3, "kl_rows": 1, "epochs": 2}, scope="task", options={"unit": "%"}),
    Team("restaurants", "Listings: attributes become a sentence", "BLEU", "bleu",
         {"learning_rate": 2.5e-3, "kl_rows": 2}, PLAIN, scope="task"),
)  # fmt: skip
BY_NAME = {team.name: team for team in TEAMS}
CUT = "restaurants"  # whose note is published a second time, cut to a smaller rank
