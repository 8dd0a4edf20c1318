"""A mixed batch on the real base: each answer against its solo run with merged weights; 32 together against 32 solo.

Full bank, ranks 1 to 64, base rows between them, float32. Equality is checked first (positions where the oracle's two
best logits differ by less than 1e-4 are counted and end a comparison); only then the times are taken, interleaved.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from main_job import rows_of
from postil.adapter import AdaptedModel, LoraConfig, attach
from postil.adapter.merge import merge, unmerge
from postil.base import live_digest, load_base
from postil.demo.teams import TEAMS
from postil.engine import Answer, Engine, Request
from postil.files import write_json

RESULT = Path(__file__).parent / "results" / "mixed_batch.json"
RANKS = (1, 2, 4, 8, 16, 32, 64)
NEW_TOKENS = 48
NEAR = 1e-4


def requests() -> list[Request]:
    """32 requests, every fourth of them for the bare base, the others over all adapters."""
    texts = [row["messages"][0]["content"] for row in rows_of(TEAMS[1].file("test"))[:32]]
    names = [None if i % 4 == 3 else f"r{RANKS[i % len(RANKS)]}" for i in range(32)]
    return [Request(prompt=t, adapter=a, max_new_tokens=NEW_TOKENS) for t, a in zip(texts, names, strict=True)]


def with_adapters(dtype: str) -> AdaptedModel:
    """The base with a full bank of random adapters strong enough to change its answers."""
    model = attach(load_base("smollm2-135m-instruct", dtype=dtype))
    for rank in RANKS:
        attach(model, LoraConfig(r=rank, alpha=2 * rank, target_modules="all-linear"), name=f"r{rank}", seed=rank)
        generator = torch.Generator().manual_seed(rank)
        for key, view in model.resident(f"r{rank}").keys.items():
            if ".lora_B" in key:
                view.copy_(torch.randn(view.shape, generator=generator) * 0.02 / rank**0.5)
    return model


def solo(model: AdaptedModel, request: Request) -> Answer:
    """The request alone, on the base with its adapter merged (plain weights, no adapter path)."""
    plain = Request(prompt=request.prompt, max_new_tokens=request.max_new_tokens)
    if request.adapter is not None:
        merge(model, request.adapter)
    try:
        with Engine(model) as engine:
            return engine.run([plain])[0]
    finally:
        if request.adapter is not None:
            unmerge(model)


def compared(mixed: list[Answer], oracle: list[Answer]) -> dict[str, int]:
    """Positions equal, near ties (where a comparison ends), and real differences."""
    counts = {"positions": 0, "near_ties": 0, "differences": 0}
    for one, other in zip(mixed, oracle, strict=True):
        for i in range(max(len(one.ids), len(other.ids))):
            counts["positions"] += 1
            if i < min(len(one.ids), len(other.ids)) and one.ids[i] == other.ids[i]:
                continue
            near = i < len(other.margins) and other.margins[i] < NEAR
            counts["near_ties" if near else "differences"] += 1
            break
    return counts


def main() -> int:
    """Equality in float32, then times in the dtype that users serve in."""
    model = with_adapters("float32")
    before = live_digest(model.model)
    asked = requests()
    with Engine(model, max_batch=32) as engine:
        mixed = engine.run(asked)
    oracle = [solo(model, request) for request in asked]
    counts = compared(mixed, oracle)
    bare = [a.ids for a, r in zip(mixed, asked, strict=True) if r.adapter is None]
    changed = sum(a.ids != solo(model, Request(prompt=r.prompt, max_new_tokens=NEW_TOKENS)).ids
                  for a, r in zip(mixed, asked, strict=True) if r.adapter is not None)  # fmt: skip
    result: dict[str, Any] = {
        "equality": counts,
        "near_tie_share": counts["near_ties"] / counts["positions"],
        "base_rows": len(bare),
        "adapter_rows_that_differ_from_the_base": changed,
        "fingerprint_unchanged": before == live_digest(model.model),
    }
    equal = counts["differences"] == 0 and result["near_tie_share"] <= 0.001
    print(json.dumps(result, indent=1), flush=True)
    if equal:
        result |= times()
    write_json(RESULT, result)
    print(json.dumps(result, indent=1))
    return 0 if equal and result["ratio"] < 0.25 else 1


def times() -> dict[str, Any]:
    """Together against one after another, in bf16, three rounds interleaved."""
    model = with_adapters("bfloat16")
    asked = requests()
    together, apart = [], []
    with Engine(model, max_batch=32) as engine:
        engine.run(asked[:2])
        for _ in range(3):
            began = time.perf_counter()
            batch = engine.run(asked)
            together.append(time.perf_counter() - began)
            began = time.perf_counter()
            singles = [engine.run([request])[0] for request in asked]
            apart.append(time.perf_counter() - began)
    return {
        "together_seconds": [round(x, 2) for x in together],
        "apart_seconds": [round(x, 2) for x in apart],
        "new_tokens": [sum(len(a.ids) for a in batch), sum(len(a.ids) for a in singles)],
        "ratio": round(statistics.median(together) / statistics.median(apart), 4),
    }


if __name__ == "__main__":
    sys.exit(main())
