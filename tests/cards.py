"""Makers of score cards for the tests of the gate, the registry and their commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from postil.judging.card.model import Comparison, DataUsed, Estimate, Part, ScoreCard


def comparison(
    base: float, adapter: float, *, metric: str = "bleu", better: Any = "higher", half: float = 1.0, rows: int = 100
) -> Comparison:
    """A measure whose intervals are `half` wide on each side, with the verdict that follows."""

    def estimate(value: float) -> Estimate:
        return Estimate(value=value, low=value - half, high=value + half)

    gain = (adapter - base) * (1 if better == "higher" else -1)
    verdict: Any = "better" if gain > half else "worse" if gain < -half else "no evidence"
    return Comparison(
        metric=metric, better=better, unit="%" if metric == "accuracy" else metric, rows=rows, base=estimate(base),
        adapter=estimate(adapter), difference=estimate(adapter - base), verdict=verdict, detectable=1.4 * half,
    )  # fmt: skip


def card(
    bleu: float = 60.0,
    nats: float = 2.93,
    *,
    slices: dict[str, float] | None = None,
    data: str = "rows-a",
    bytes_of: Path | None = None,
    source: str = "sha256:base",
) -> ScoreCard:
    """A card: BLEU 30 → `bleu`, general nats 2.9 → `nats`; slices: intent → accuracy (base 50)."""
    sliced = {
        "intent": {name: {"bleu": comparison(30, bleu), "accuracy": comparison(50, value, metric="accuracy", half=5)}
                   for name, value in (slices or {}).items()}
    }  # fmt: skip
    target = Part(
        data=DataUsed(name="test.jsonl", sha256=data, rows=100),
        main="accuracy" if slices else "bleu",
        measures={"bleu": comparison(30, bleu), "accuracy": comparison(50, 70, metric="accuracy", half=2)},
        few_shot={"bleu": Estimate(value=41, low=40, high=42)},
        shots=4,
        slices=sliced if slices else {},
    )
    general = Part(
        data=DataUsed(name="general", sha256="general-a", rows=40, tokens=4000),
        main="nats",
        measures={"nats": comparison(2.9, nats, metric="nats", better="lower", half=0.01)},
    )
    digest = "none"
    if bytes_of is not None:
        from postil.adapter.identity import adapter_sha256

        digest = adapter_sha256(bytes_of)
    return ScoreCard(
        base={"source": source, "form": "fp32"}, adapter_sha256=digest, target=target, general={"nats": general},
        command="postil judge ADAPTER --base BASE --target test.jsonl",
    )  # fmt: skip


def changed(given: ScoreCard, **fields: Any) -> ScoreCard:
    """A copy of a card with other fields."""
    return ScoreCard(**(dict(given) | fields))
