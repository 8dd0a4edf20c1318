"""What a report tells of: a run or an adapter with its recipe, log, score card, predictions and spectrum."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from postil.adapter.peft_files import CONFIG, OWN, load_adapter
from postil.adapter.spectrum import Spectrum, spectrum
from postil.errors import JudgeError
from postil.judging.card.file import read_card
from postil.judging.card.model import ScoreCard

LOG, RECIPE, PREDICTIONS = "log.jsonl", "recipe.yaml", "predictions.jsonl"


@dataclass(frozen=True, slots=True)
class Reported:
    """One run or adapter. place: the directory that the user named; recipe: as its file says, empty where there is
    none; log: one mapping a step; predictions: lines of `postil judge --predictions`."""

    name: str
    place: Path
    facts: dict[str, str]
    recipe: dict[str, Any] = field(default_factory=dict)
    log: Sequence[dict[str, Any]] = ()
    card: ScoreCard | None = None
    predictions: Sequence[dict[str, Any]] = ()
    spectra: Sequence[Spectrum] = ()


def run_of(place: Path) -> Path | None:
    """The run directory that `place` is, or that it lies in as `adapter` or `model`; None for neither."""
    found = [one for one in (place, place.resolve().parent) if (one / LOG).is_file() or (one / RECIPE).is_file()]
    return found[0] if found else None


def read_reported(place: str | Path, *, predictions: str | Path | None = None, spectra: bool = True) -> Reported:
    """Everything that a run directory, an adapter directory or a fine-tuned model's tells.

    predictions: a JSONL of `postil judge --predictions` (else predictions.jsonl in the run, where there is one).
    spectra: take the spectrum of an adapter (cheap; a whole model's is not taken). Raises JudgeError where there is
    neither run nor adapter, or a file cannot be read.
    """
    place = Path(place)
    run = run_of(place)
    made = _made(place, run)
    if run is None and made is None:
        raise JudgeError(f"{place} is no run (it has no {LOG}), no adapter ({CONFIG}) and no model (config.json)")
    own = _object(made / OWN) if made is not None else {}
    recipe = _recipe(run, own)
    facts, found = _facts(recipe, own), list[Spectrum]()
    if made is not None and (made / CONFIG).is_file():
        adapter = load_adapter(made)
        ranks = sorted(set(adapter.ranks.values()))
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}..{ranks[-1]}"
        facts |= {"rank": rank, "modules": str(len(adapter.modules)), "parameters": f"{adapter.parameters:,}"}
        facts.setdefault("base", adapter.base_name or "unknown")
        found = spectrum(adapter) if spectra else []
    if predictions is None and run is not None and (run / PREDICTIONS).is_file():
        predictions = run / PREDICTIONS
    return Reported(
        name=(run or place).resolve().name,
        place=place,
        facts=facts,
        recipe=recipe,
        log=_lines(run / LOG, "step") if run is not None and (run / LOG).is_file() else (),
        card=read_card(made) if made is not None and "card" in own else None,
        predictions=_lines(Path(predictions), "set") if predictions is not None else (),
        spectra=found,
    )


def _made(place: Path, run: Path | None) -> Path | None:
    """The directory of the adapter or model itself."""
    inner = [run / name for name in ("adapter", "model")] if run is not None and run == place else []
    places = [one for one in (place, *inner) if (one / CONFIG).is_file() or (one / "config.json").is_file()]
    return places[0] if places else None


def _recipe(run: Path | None, own: dict[str, Any]) -> dict[str, Any]:
    kept = own.get("card")
    found = (kept.get("recipe") if isinstance(kept, dict) else None) or own.get("recipe")
    if isinstance(found, dict):
        return found
    if run is None or not (run / RECIPE).is_file():
        return {}
    try:
        value = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise JudgeError(f"{run / RECIPE} cannot be read: {' '.join(str(error).split())}") from None
    return value if isinstance(value, dict) else {}


def _facts(recipe: dict[str, Any], own: dict[str, Any]) -> dict[str, str]:
    """What stands over a report, in words by name."""
    training = recipe.get("training") if isinstance(recipe.get("training"), dict) else {}
    assert isinstance(training, dict)
    facts = {"base": recipe.get("base"), "data": recipe.get("data"), "method": training.get("method")}
    facts |= {key.replace("_", " "): training.get(key) for key in ("learning_rate", "epochs", "batch_size", "seed")}
    facts |= {key.replace("_", " "): training.get(key) for key in ("guard", "kl_weight", "general_share")}
    card = own.get("card")
    shrunk = card.get("shrunk") if isinstance(card, dict) else None
    if isinstance(shrunk, dict):
        facts["shrunk to"] = f"rank {shrunk['rank']}" if shrunk.get("rank") else f"{shrunk.get('keep')} of the energy"
    return {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in facts.items() if value}


def _object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise JudgeError(f"{file} cannot be read ({error}); save the adapter anew") from None
    return value if isinstance(value, dict) else {}


def _lines(file: Path, key: str) -> list[dict[str, Any]]:
    """The objects of a JSONL file that hold `key`. Raises JudgeError naming the line."""
    try:
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # U+2028 ends no line of JSON
    except (OSError, UnicodeDecodeError) as error:
        raise JudgeError(f"{file} cannot be read ({error})") from None
    out = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError:
            if number == len(lines):  # a run that is still writing, or was killed
                break
            raise JudgeError(f"{file}:{number} is no JSON; write the file anew") from None
        if not isinstance(value, dict) or key not in value:
            raise JudgeError(f"{file}:{number} has no {key!r}; give a file that postil wrote")
        out.append(value)
    return out
