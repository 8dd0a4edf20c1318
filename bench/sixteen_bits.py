"""A bfloat16 training step on this CPU: products in float32 tiles (ours) beside torch's own, interleaved.

One LoRA and one QLoRA step (r=8 on q, k, v, o) of eight sequences of 57 tokens on the real base: forward and
backward. On a processor that has 16-bit instructions both ways are the same, and the ratio is 1. Also prints the
largest difference of loss between the two ways. Writes bench/results/sixteen_bits.json.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from unittest.mock import patch

import torch

from main_job import machine
from postil.adapter import AdaptedModel, LoraConfig, attach
from postil.base import load_base
from postil.files import write_json
from postil.kernels.dense import op
from postil.kernels.layout import Layout
from postil.training.batch import spans_of
from postil.training.optimizer import AdapterWeights

RESULT = Path(__file__).parent / "results" / "sixteen_bits.json"
LENGTHS = [57] * 8
ROUNDS = 5


def step(model: AdaptedModel, own: bool) -> tuple[float, float]:
    """(seconds, loss) of one forward and backward pass, with torch's own products or ours."""
    ids = torch.randint(0, 49152, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    resident = model.resident("default")
    with patch.object(op, "multiplies", (lambda _dtype: True) if own else op.multiplies):
        began = time.perf_counter()
        with model.using(Layout.packed(LENGTHS, spans_of(resident, len(ids)))):
            loss, _, _ = model.loss(ids, positions, torch.where(positions > 0, 1 / len(ids), 0.0))
            loss.backward()  # type: ignore[no-untyped-call]
        return time.perf_counter() - began, float(loss.detach())


def main() -> None:
    """Both methods, both ways by turns."""
    result = {}
    for method, quant in (("lora", None), ("qlora", "nf4")):
        model = attach(load_base("smollm2-135m-instruct", dtype="bfloat16", quant=quant), LoraConfig(), seed=0)
        AdapterWeights.of(model.resident("default"))  # gradients on
        step(model, own=True), step(model, own=False)
        pairs = [(step(model, own=True), step(model, own=False)) for _ in range(ROUNDS)]
        torchs, ours = (statistics.median(pair[i][0] for pair in pairs) for i in (0, 1))
        result[method] = {
            "torch_seconds": round(torchs, 3),
            "ours_seconds": round(ours, 3),
            "ratio": round(torchs / ours, 2),
            "loss_apart": max(abs(a[1] - b[1]) for a, b in pairs),
        }
    write_json(RESULT, result | {"rounds": ROUNDS, "tokens": sum(LENGTHS), "machine": machine()})
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
