"""Charts of spectra: singular values by their number, and effective ranks by layer, a line per kind of module."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from postil.reporting.curves import Line, chart

if TYPE_CHECKING:
    from postil.adapter.spectrum import Spectrum

MOST_POINTS = 200  # of a line: a full fine-tune has as many singular values as the model has dimensions


def charts(found: Sequence[Spectrum]) -> list[tuple[str, str, list[Line]]]:
    """(title, chart, its lines for a legend): singular values (medians over layers), and effective ranks."""
    kinds: dict[str, list[Spectrum]] = {}
    for one in found:
        kinds.setdefault(one.path.rsplit(".", 1)[-1], []).append(one)
    values = [Line(kind, _middle(ones)) for kind, ones in kinds.items()]
    ranks = [
        Line(kind, [(float(_layer(one, place)), one.entropy_rank) for place, one in enumerate(ones)])
        for kind, ones in kinds.items()
    ]
    longest = max((len(one.values) for one in found), default=0)
    layers = max((x for line in ranks for x, _ in line.points), default=0.0)
    return [
        ("singular values", chart(values, "singular values", x_text=f"number {longest}", log=True), values),
        ("effective rank by layer", chart(ranks, "effective rank by layer", x_text=f"layer {layers:g}"), ranks),
    ]


def _layer(one: Spectrum, place: int) -> int:
    return next((int(part) for part in one.path.split(".") if part.isdigit()), place)


def _middle(ones: Sequence[Spectrum]) -> list[tuple[float, float]]:
    """The median over layers of each singular value, thinned where there are many."""
    count = max(len(one.values) for one in ones)
    step = max(1, -(-count // MOST_POINTS))
    return [
        (float(n + 1), statistics.median(float(one.values[n]) for one in ones if n < len(one.values)))
        for n in range(0, count, step)
    ]
