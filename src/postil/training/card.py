"""What an adapter's card tells of its training: the recipe, the data and its rows by digests, the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from postil.adapter.bank import Resident
from postil.adapter.model import AdaptedModel
from postil.data import Dataset, Sample
from postil.data.digests import KINDS, DigestSet, Seen, seen_of
from postil.errors import AdapterError, DataError
from postil.training.general import Documents
from postil.training.options import Settled

if TYPE_CHECKING:
    from postil.training.loop import Outcome

VERSIONS = ("postil", "torch", "transformers")
SEEN = "seen"  # the key of the rows' digests
Given = Documents | Dataset | Sequence[Sample] | None


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
    seen: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The card's parts, plain JSON values. Data that was given as samples has no digest. seen: as rows_seen gives."""
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
    told |= {SEEN: dict(seen)} if seen is not None else {}
    return told | ({"template_hash": data.report.template_hash} if isinstance(data, Dataset) else {})


def rows_seen(
    trained: Seen | None, held_out: Seen | None, general: Seen | None, earlier: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The digests of the rows trained on, held out to choose the state by, and of general text watched and held to;
    None for rows that are not known, having come as samples. earlier: the same of the training that this one went on
    from ({} where that does not tell), whose rows are among them; None where it began anew."""
    own = {"trained": trained, "held_out": held_out, "general": general}
    return {
        "complete": None not in own.values() and (earlier is None or bool(earlier.get("complete"))),
        **{name: _joined(found, (earlier or {}).get(name)) for name, found in own.items()},
    }


def _joined(found: Seen | None, earlier: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if found is None and earlier is None:
        return None
    sets = dict(found or seen_of(()))
    for kind in KINDS:
        if earlier is not None and kind in earlier:
            sets[kind] |= DigestSet.parse(earlier[kind])
    return {kind: one.as_dict() for kind, one in sets.items()}


def digests_of(data: Given, samples: Sequence[Sample] | None = None) -> Seen | None:
    """The digests of the rows of `samples` (of all samples) of a Dataset; none for no rows, None where they came as
    samples, which do not tell what text they were."""
    if isinstance(data, Documents):
        return data.seen if len(data) else seen_of(())
    chosen = samples if samples is not None else data.samples if isinstance(data, Dataset) else data
    if not chosen:
        return seen_of(())
    rows = {sample.row for sample in chosen}
    if not isinstance(data, Dataset) or not rows <= data.digests.keys():
        return None
    return seen_of(data.digests[row] for row in rows)


def earlier_rows(resident: Resident) -> Mapping[str, Any] | None:
    """What the adapter's card tells of rows seen before the training to come; None for one that is untouched. Raises
    AdapterError where that cannot be read, before the work and not after it."""
    if SEEN in resident.card:
        try:
            told = dict(resident.card[SEEN])
            rows_seen(None, None, None, told)
        except (DataError, TypeError, ValueError) as problem:
            raise AdapterError(
                f"what the card of {resident.name!r} tells of the rows it has seen cannot be read ({problem}): take "
                f"{SEEN!r} out of the card in its postil.json, and what it has seen counts as unknown"
            ) from None
        return told
    begins_at_zero = (".lora_B.weight", ".lora_embedding_A")
    return (
        {} if any(bool(view.any()) for key, view in resident.keys.items() if key.endswith(begins_at_zero)) else None
    )


def _digest(given: Given) -> str | None:
    if isinstance(given, Documents):
        return given.sha256
    return given.report.sha256 if isinstance(given, Dataset) else None
