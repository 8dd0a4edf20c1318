"""What an adapter's card tells of its training: the recipe, the data by its digests, the versions, the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from postil.adapter.model import AdaptedModel
from postil.data import Dataset, Sample
from postil.training.options import Settled

if TYPE_CHECKING:
    from postil.training.loop import Outcome

VERSIONS = ("postil", "torch", "transformers")
Given = Dataset | Sequence[Sample] | None


def recipe_of(model: AdaptedModel, name: str, data: Given, options: Settled) -> dict[str, Any]:
    """The keys of a recipe (training.recipe) that a run from Python is known by."""
    told: dict[str, Any] = {"base": model.base.source}
    if isinstance(data, Dataset):
        told |= {"data": data.report.source, "rows": data.options.model_dump(mode="json")}
    return {
        **told,
        "lora": model.resident(name).config.model_dump(mode="json"),
        "training": options.model_dump(mode="json"),
    }


def card_of(
    recipe: Mapping[str, Any],
    outcome: Outcome,
    data: Given,
    *,
    samples: int,
    held_out: Given = None,
    held_out_samples: int = 0,
    general: Given = None,
) -> dict[str, Any]:
    """The card's parts, plain JSON values. Data that was given as samples has no digest."""
    told = {
        "recipe": dict(recipe),
        "data": {
            "sha256": _digest(data),
            "format": data.report.format if isinstance(data, Dataset) else None,
            "samples": samples,
            "held_out": held_out_samples,
            "held_out_sha256": _digest(held_out),
            "general_sha256": _digest(general),
        },
        "versions": {name: version(name) for name in VERSIONS},
        "result": {
            "steps": outcome.steps,
            "valid_loss": outcome.valid_loss,
            "best_step": outcome.best_step,
            "guard": outcome.guarded.facts() if outcome.guarded is not None else None,
        },
    }
    return told | ({"template_hash": data.report.template_hash} if isinstance(data, Dataset) else {})


def _digest(given: Given) -> str | None:
    return given.report.sha256 if isinstance(given, Dataset) else None
