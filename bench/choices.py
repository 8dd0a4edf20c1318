"""Multiple choice by likelihood: postil's scoring beside lm-eval's own Hugging Face model, on the same questions.

Both are asked lm-eval's requests, (context, choice), on the same weights in float32, in turns; their log-likelihoods
are compared and the medians of their times divided. Writes bench/results/choices.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from main_job import BASE, machine
from postil.adapter import attach
from postil.base import load_base
from postil.files import write_json
from postil.judging.harness import HarnessModel

RESULT = Path(__file__).parent / "results" / "choices.json"
SETS = ("mmlu_val", "arc_challenge", "commonsenseqa")
BATCH = 16  # of lm-eval's model: on a CPU it has no automatic one


def asked(path: Path, count: int) -> list[Instance]:
    """The first `count` questions of a set as requests, a choice each."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    return [
        Instance("loglikelihood", row, (f"Question: {row['context']}\nAnswer:", f" {choice}"), index)
        for row in rows
        for index, choice in enumerate(row["choices"])
    ]


def timed(model: Any, requests: list[Instance]) -> tuple[list[tuple[float, bool]], float]:
    """The answers, and the seconds that they took."""
    began = time.perf_counter()
    found = model.loglikelihood(requests, disable_tqdm=True)
    return found, time.perf_counter() - began


def main() -> int:
    """Every set: equality, then times in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    plain = load_base(BASE, dtype="float32")
    theirs = HFLM(pretrained=plain.model, tokenizer=plain.tokenizer, batch_size=BATCH, device="cpu")
    ours = HarnessModel(attach(load_base(BASE, dtype="float32")), None)
    sets: dict[str, dict[str, Any]] = {}
    with torch.inference_mode():
        for name in SETS:
            requests = asked(given.data / "general" / f"{name}.jsonl", given.questions)
            seconds: dict[str, list[float]] = {"postil": [], "lm-eval": []}
            apart = 0.0
            for _ in range(given.repeats):
                reference, first = timed(theirs, requests)
                found, second = timed(ours, requests)
                seconds["lm-eval"].append(first)
                seconds["postil"].append(second)
                apart = max(apart, *(abs(a - b) for (a, _), (b, _) in zip(reference, found, strict=True)))
            middle = {who: statistics.median(taken) for who, taken in seconds.items()}
            sets[name] = {
                "questions": given.questions, "requests": len(requests), "largest_difference_nats": round(apart, 6),
                "seconds": {who: round(value, 2) for who, value in middle.items()},
                "ratio": round(middle["lm-eval"] / middle["postil"], 2),
            }  # fmt: skip
            print(name, sets[name], flush=True)
    write_json(RESULT, {"base": BASE, "dtype": "float32", "sets": sets, "machine": machine()})
    return 0 if all(one["largest_difference_nats"] < 1e-2 for one in sets.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
