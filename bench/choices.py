"""Multiple choice by likelihood: postil's scoring beside lm-eval's own Hugging Face model, on the same questions.

Both are asked lm-eval's requests, (context, choice), on the same weights in float32, in turns; their log-likelihoods
are compared and the medians of their times divided. Writes bench/results/choices.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from evidence import rows_of
from main_job import BASE, machine
from postil.adapter import attach
from postil.base import load_base
from postil.files import write_json
from postil.judging.asking.harness import HarnessModel

RESULT = Path(__file__).parent / "results" / "choices.json"
SETS = (("mmlu_val", 0), ("mmlu_val", 5), ("arc_challenge", 0), ("commonsenseqa", 0))  # and examples before each
BATCH = 16  # of lm-eval's model: on a CPU it has no automatic one


def asked(path: Path, count: int, shots: int) -> list[Instance]:
    """The first `count` questions of a set as requests, a choice each, after examples from its end."""
    rows = rows_of(path, None)
    examples = "".join(f"{question(row)} {row['choices'][row['answer']]}\n\n" for row in rows[len(rows) - shots :])
    return [
        Instance("loglikelihood", row, (examples + question(row), f" {choice}"), index)
        for row in rows[:count]
        for index, choice in enumerate(row["choices"])
    ]


def question(row: dict[str, Any]) -> str:
    """A row's question as lm-eval's tasks write one."""
    return f"Question: {row['context']}\nAnswer:"


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
        for name, shots in SETS:
            requests = asked(given.data / "general" / f"{name}.jsonl", given.questions, shots)
            seconds: dict[str, list[float]] = {"postil": [], "lm-eval": []}
            apart = 0.0
            for _ in range(given.repeats):
                reference, first = timed(theirs, requests)
                found, second = timed(ours, requests)
                seconds["lm-eval"].append(first)
                seconds["postil"].append(second)
                apart = max(apart, *(abs(a - b) for (a, _), (b, _) in zip(reference, found, strict=True)))
            middle = {who: statistics.median(taken) for who, taken in seconds.items()}
            one = {
                "questions": given.questions, "requests": len(requests), "largest_difference_nats": round(apart, 6),
                "seconds": {who: round(value, 2) for who, value in middle.items()},
                "ratio": round(middle["lm-eval"] / middle["postil"], 2),
            }  # fmt: skip
            sets[f"{name}, {shots} examples before each"] = one
            print(name, shots, one, flush=True)
    write_json(RESULT, {"base": BASE, "dtype": "float32", "sets": sets, "machine": machine()})
    return 0 if all(this["largest_difference_nats"] < 1e-2 for this in sets.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
