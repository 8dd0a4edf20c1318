"""The main job on real input: E2E NLG notes on SmolLM2, BLEU gained against general text lost, per learning rate.

Each run is a recipe in recipes/main_job/ with its measured JSON beside it: `python bench/main_job.py run NAME`
trains and judges one, `base` judges the bare base (zero-shot and with five examples), `table` prints all.
The data lie in a folder given by --data (e2e_nlg/ and general/ as described in its own notes).
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sacrebleu
import torch
import yaml

from postil.adapter import AdaptedModel, LoraConfig, attach
from postil.base import load_base
from postil.data import DataOptions, load_data
from postil.engine import Engine, Request
from postil.files import write_json
from postil.judging.asking.likelihoods import mean_nats, row_losses, windows
from postil.kernels.dense import instructions
from postil.training import TrainOptions
from postil.training.loop import run as run_training

BASE = "smollm2-135m-instruct"
HERE = Path(__file__).parents[1] / "recipes" / "main_job"
RAW = DataOptions(format="raw")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, gzipped or not."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def training_rows(data: Path, count: int) -> list[dict[str, Any]]:
    """The first `count` rows of the training file, which is shuffled already."""
    return rows_of(data / "e2e_nlg" / "train.jsonl.gz")[:count]


def test_set(data: Path) -> tuple[list[str], list[list[str]]]:
    """The 630 test meaning representations and their references."""
    official = data / "e2e_nlg" / "official"
    prompts = (official / "test_mrs.txt").read_text(encoding="utf-8").splitlines()
    groups = (official / "test_refs.txt").read_text(encoding="utf-8").strip().split("\n\n")
    return prompts, [group.splitlines() for group in groups]


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU with every reference (sacrebleu's nrefs:var)."""
    most = max(len(group) for group in references)
    streams = [[group[i] if i < len(group) else None for group in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(answers), streams).score)


def texts_of(path: Path) -> list[str]:
    """The documents of a text file."""
    return [row["text"] for row in rows_of(path)]


def general(model: AdaptedModel, data: Path, adapter: str | None) -> dict[str, float]:
    """Nats per token of general text, at the issue's setting and at the reference's."""
    folder = data / "general"
    tokenizer = model.base.tokenizer
    test = windows(tokenizer, texts_of(folder / "wikitext2_test.jsonl"), 32_768, 1024)
    valid = windows(tokenizer, texts_of(folder / "wikitext2_valid.jsonl"), 16_384, 512)
    return {
        "wikitext2_test_32768x1024": mean_nats(row_losses(model, test, adapter)),
        "wikitext2_valid_16384x512": mean_nats(row_losses(model, valid, adapter)),
    }


def answers_of(model: AdaptedModel, prompts: Sequence[str], adapter: str | None) -> list[str]:
    """Greedy answers, one line each."""
    with Engine(model, max_batch=64) as engine:
        requests = [Request(prompt=p, raw=True, adapter=adapter, max_new_tokens=80, stop=("\n",)) for p in prompts]
        return [answer.text.strip() for answer in engine.run(requests)]


def judged(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU over all 630 test inputs and over 200 spread evenly among them (the reference's setting)."""
    spread = [i * len(answers) // 200 for i in range(200)]
    return {
        "bleu_630": bleu(answers, references),
        "bleu_200": bleu([answers[i] for i in spread], [references[i] for i in spread]),
    }


def machine() -> dict[str, Any]:
    """Where and from what a figure comes."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "commit": commit.stdout.strip(),
        "cpu": cpu,
        "instructions": instructions(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def run(name: str, data: Path, out: Path) -> None:
    """Train and judge recipes/main_job/NAME.yaml, resuming a run that was stopped; write NAME.json."""
    recipe = yaml.safe_load((HERE / f"{name}.yaml").read_text(encoding="utf-8"))
    options = TrainOptions.parse(recipe["training"])
    model = attach(load_base(BASE, dtype=recipe["dtype"]))
    samples = load_data(training_rows(data, recipe["rows"]), model.base, RAW).samples
    valid = load_data(rows_of(data / "e2e_nlg" / "valid.jsonl")[::7], model.base, RAW).samples
    adapter = None
    if options.method == "lora":
        attach(model, LoraConfig.parse(recipe.get("lora", {})), seed=options.seed)
        adapter = "default"
    outcome = run_training(
        model, samples, [], out=out / name, name="default", options=options,
        watch=lambda e: print(e["step"], e["total_steps"], round(e["loss"], 3), e["seconds"], flush=True),
    )  # fmt: skip
    steps = [json.loads(line) for line in (out / name / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = sum(step.get("seconds", 0) for step in steps)  # of all steps, whatever process took them
    result: dict[str, Any] = {
        "recipe": recipe,
        "steps": outcome.steps,
        "tokens": sum(len(sample.ids) for sample in samples) * options.epochs,
        "train_seconds": round(seconds, 1),
        "valid_nats": mean_nats(row_losses(model, valid, adapter)),
    }
    if recipe.get("judge", True):
        prompts, references = test_set(data)
        answers = answers_of(model, [prompt + "\n" for prompt in prompts], adapter)
        result |= judged(answers, references) | {"general": general(model, data, adapter)}
        result["answers"] = answers
    write_json(HERE / f"{name}.json", result | {"machine": machine()})
    print(json.dumps({key: value for key, value in result.items() if key != "recipe"}, indent=1))


def judge_base(data: Path) -> None:
    """The bare base: zero-shot as a user's turn, and with five examples in a plain prompt."""
    model = attach(load_base(BASE, dtype="bfloat16"))
    prompts, references = test_set(data)
    examples = [row for row in training_rows(data, 3_000) if 60 < len(row["prompt"]) < 140][:5]
    shots = "".join(f"{row['prompt']}\n{row['completion']}\n\n" for row in examples)
    with Engine(model, max_batch=64) as engine:
        ask = "Write one sentence about the restaurant with exactly these facts: "
        asked = [Request(prompt=ask + prompt, max_new_tokens=80, stop=("\n",)) for prompt in prompts]
        zero = [answer.text.strip() for answer in engine.run(asked)]
    few = answers_of(model, [shots + prompt + "\n" for prompt in prompts], None)
    result = {
        "zero_shot": judged(zero, references) | {"answers": zero[:3]},
        "five_shot": judged(few, references) | {"answers": few[:3]},
        "general": general(model, data, None),
        "machine": machine(),
    }
    write_json(HERE / "base.json", result)
    print(json.dumps(result, indent=1))


def table() -> None:
    """Every committed result, as Markdown."""
    base = json.loads((HERE / "base.json").read_text(encoding="utf-8"))
    better = max(base["zero_shot"]["bleu_630"], base["five_shot"]["bleu_630"])
    test, valid = "wikitext2_test_32768x1024", "wikitext2_valid_16384x512"
    print(
        "| run | rows | learning rate | valid nats | BLEU 630 | gain | BLEU 200 | general test | general valid | s |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for kind in ("zero_shot", "five_shot"):
        one = base[kind]
        print(f"| base, {kind.replace('_', '-')} | | | | {one['bleu_630']:.1f} | | {one['bleu_200']:.1f} | 0 | 0 | |")
    for path in sorted(HERE.glob("*.json")):
        if path.stem == "base":
            continue
        one = json.loads(path.read_text(encoding="utf-8"))
        cells = [
            path.stem,
            one["recipe"]["rows"],
            one["recipe"]["training"]["learning_rate"],
            f"{one['valid_nats']:.4f}",
        ]
        if "bleu_630" in one:
            cells += [
                f"{one['bleu_630']:.1f}", f"{one['bleu_630'] - better:+.1f}", f"{one['bleu_200']:.1f}",
                f"{one['general'][test] - base['general'][test]:+.3f}",
                f"{one['general'][valid] - base['general'][valid]:+.3f}",
            ]  # fmt: skip
        else:
            cells += [""] * 5
        print("| " + " | ".join(str(cell) for cell in [*cells, f"{one['train_seconds']:.0f}"]) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "base", "table"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/main_job"))
    given = parser.parse_args()
    if given.what == "base":
        judge_base(given.data)
    elif given.what == "table":
        table()
    for one_name in given.names:
        run(one_name, given.data, given.out)
