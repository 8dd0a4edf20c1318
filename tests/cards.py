"""Makers of score cards for the tests of the gate, the registry and their commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from postil.judging.card.model import Comparison, DataUsed, Estimate, Part, ScoreCard, verdict_of

ALONE = 3.0  # a value's own interval is this much wider than that of the paired difference


def estimate(value: float, half: float) -> Estimate:
    """A value with an interval `half` wide on each side."""
    return Estimate(value=value, low=value - half, high=value + half)


def comparison(
    base: float, adapter: float, *, metric: str = "bleu", better: Any = "higher", half: float = 1.0, rows: int = 100,
    unit: str | None = None, **more: Any,
) -> Comparison:  # fmt: skip
    """A measure whose difference's interval is `half` wide on each side (the two values' own are wider, as they are
    where rows differ more than systems do), with the verdict that follows. more: any other field."""
    units = {"accuracy": "%", "nats": "nats/token", "kl": "nats/token", "same_start": "%", "alike": "%"}
    difference = estimate(adapter - base, half)
    fields: dict[str, Any] = {
        "metric": metric, "better": better, "unit": unit if unit is not None else units.get(metric, "points"),
        "rows": rows, "base": estimate(base, ALONE * half), "adapter": estimate(adapter, ALONE * half),
        "difference": difference, "verdict": verdict_of(better, difference), "detectable": 1.4 * half,
    }  # fmt: skip
    return Comparison(**fields | more)


def chat(nats: float = 0.42, same_start: float = 95.0, alike: float = 1.0, rows: int = 100) -> Part:
    """The chat part: nats 0.4 → `nats`, 100% → `same_start`, 0% → `alike`."""
    return Part(
        data=DataUsed(name="postil's chat sample", sha256="chat-a", rows=rows, tokens=6000),
        main="nats",
        measures={
            "nats": comparison(0.4, nats, metric="nats", better="lower", half=0.01, rows=rows),
            "kl": comparison(0.0, 0.05, metric="kl", better="lower", half=0.01, rows=rows),
            "same_start": comparison(100, same_start, metric="same_start", half=3, rows=rows),
            "alike": comparison(0, alike, metric="alike", better="lower", half=1, rows=rows),
        },
    )


def card(
    bleu: float = 60.0,
    nats: float = 2.93,
    *,
    slices: dict[str, float] | None = None,
    data: str = "rows-a",
    bytes_of: Path | None = None,
    source: str = "sha256:base",
) -> ScoreCard:
    """A card: BLEU 30 → `bleu` (20 by copying the nearest row), general nats 2.9 → `nats`, chats kept; slices:
    intent → accuracy (base 50)."""
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
        baselines={
            "nearest_row": {"bleu": comparison(20, bleu), "accuracy": comparison(40, 70, metric="accuracy", half=2)},
            "copy_prompt": {"bleu": comparison(5, bleu), "accuracy": comparison(0, 70, metric="accuracy", half=2)},
        },
        slices=sliced if slices else {},
    )
    general = Part(
        data=DataUsed(name="general", sha256="general-a", rows=40, tokens=32_000),
        main="nats",
        measures={"nats": comparison(2.9, nats, metric="nats", better="lower", half=0.01)},
    )
    digest = "none"
    if bytes_of is not None:
        from postil.adapter.identity import adapter_sha256

        digest = adapter_sha256(bytes_of)
    return ScoreCard(
        base={"source": source, "form": "fp32"}, adapter_sha256=digest, target=target,
        general={"nats": general, "chat": chat()}, chat_template=True,
        command="postil judge ADAPTER --base BASE --target test.jsonl",
    )  # fmt: skip


def changed(given: ScoreCard, **fields: Any) -> ScoreCard:
    """A copy of a card with other fields."""
    return ScoreCard(**(dict(given) | fields))
