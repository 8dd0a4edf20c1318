"""Dotted paths to the measures of a score card: "target.bleu", "general.nats", "target.intent=refund.accuracy"."""

from __future__ import annotations

from collections.abc import Iterator

from postil.errors import JudgeError, listed, nearest
from postil.judging.card.model import Comparison, Part, ScoreCard


def find(card: ScoreCard, path: str) -> Comparison:
    """The measure that a path means.

    `target` and `general.PART` (nats, kl, choices, pairs) mean the part's main measure, `….MEASURE` another one;
    `….COLUMN=VALUE` and `….COLUMN=VALUE.MEASURE` those of a slice, whatever dots the value holds. Raises JudgeError
    with the nearest known path.
    """
    known = dict(paths(card))
    if path not in known:
        near = nearest(path, known) or f"; it holds {listed(known)}"
        raise JudgeError(f"the score card holds no measure {path!r}{near}")
    return known[path]


def paths(card: ScoreCard) -> Iterator[tuple[str, Comparison]]:
    """Every path of a card with its measure; a measure has several where it is a main one."""
    if card.target is not None:
        yield from _of_part("target", card.target)
    for name, part in card.general.items():
        yield from _of_part(f"general.{name}", part)


def _of_part(path: str, part: Part) -> Iterator[tuple[str, Comparison]]:
    yield from _of_measures(path, part.main, part.measures)
    for column, values in part.slices.items():
        for value, measures in values.items():
            yield from _of_measures(f"{path}.{column}={value}", part.main, measures)


def _of_measures(path: str, main: str, measures: dict[str, Comparison]) -> Iterator[tuple[str, Comparison]]:
    if main in measures:
        yield path, measures[main]
    for name, measure in measures.items():
        yield f"{path}.{name}", measure
