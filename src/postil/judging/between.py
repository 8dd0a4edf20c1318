"""Two adapters on the same rows, one beside the other: what shrinking, or any change of a note, did to it."""

from __future__ import annotations

from postil.adapter import Adapter, attach, detach
from postil.base import Base
from postil.data import DataOptions, Sample, load_data
from postil.judging.asking.likelihoods import row_losses
from postil.judging.bootstrap import compare
from postil.judging.card.build import NATS, stats_of
from postil.judging.card.model import Comparison
from postil.judging.options import GeneralOptions
from postil.judging.sets.general import read_general
from postil.judging.sets.read import From


def between(
    base: Base,
    before: Adapter,
    after: Adapter,
    *,
    target: From | None = None,
    general: From | None = None,
    options: GeneralOptions | None = None,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Nats per token of "target" and "general" (those given) with each of two adapters of one base.

    In a Comparison `base` is then the first adapter and `adapter` the second, row by row. target: rows, read as the
    first adapter's recipe reads its own; general: running text ("shipped": the sample that comes with postil).
    The base is afterwards as before. Raises DataError, AdapterError.
    """
    samples: dict[str, list[Sample]] = {}
    if target is not None:
        recipe = before.card.get("recipe")
        rows = DataOptions.parse((recipe.get("rows") if isinstance(recipe, dict) else None) or {})
        samples["target"] = load_data(target, base, rows).samples
    if general is not None:
        found = read_general(general, None, None, base, options or GeneralOptions(), seed)
        samples["general"] = list(found.windows)
    model = attach(base)
    try:
        attach(model, before, name="before")
        attach(model, after, name="after")
        out = {}
        for name, rows_ in samples.items():
            first, second = (stats_of(row_losses(model, rows_, which)) for which in ("before", "after"))
            out[name] = compare(NATS, first, second, seed=seed)
        return out
    finally:
        detach(model)
