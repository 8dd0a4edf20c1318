"""The evidence: every experiment one recipe file in recipes/evidence/SET/NAME.yaml, its score card in NAME.json.

A recipe holds what differs from its set's common.yaml: `recipe` (what `postil train` runs), `judge` (how it is
judged) and, where needed, files and row counts. `python bench/evidence.py SET/NAME …` trains and judges each that
has no result yet (a stopped run resumes), `python bench/evidence.py SET` all of a set. `shrink: {of: NAME, rank: R}`
cuts another run's adapter instead of training. The files are named within the folder of data given by --data.
docs/evidence.md is made from the results by `make docs`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from main_job import machine
from postil.adapter.peft_files import load_adapter, save_adapter
from postil.adapter.shrink import shrink
from postil.base import load_base
from postil.errors import RunError
from postil.files import write_json, write_text
from postil.judging.judge import judge
from postil.judging.options import JudgeOptions
from postil.training.recipe import Recipe, prepare

HERE = Path(__file__).parents[1] / "recipes" / "evidence"


def experiment(name: str) -> dict[str, Any]:
    """A set's common.yaml with one recipe's differences put over it, key by key."""
    folder = HERE / Path(name).parent
    common, own = (
        yaml.safe_load(path.read_text(encoding="utf-8")) for path in (folder / "common.yaml", HERE / f"{name}.yaml")
    )
    laid_over: dict[str, Any] = over(common, own or {})
    return laid_over


def over(under: Any, upper: Any) -> Any:
    """`upper` laid over `under`: mappings key by key, everything else whole."""
    if not (isinstance(under, dict) and isinstance(upper, dict)):
        return upper
    return under | {key: over(under[key], value) if key in under else value for key, value in upper.items()}


def rows_of(path: Path, count: int | None) -> list[dict[str, Any]]:
    """The first `count` rows of a JSONL file, gzipped or not (None: all)."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")[:count]]  # U+2028 ends no line of JSON


def questions(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with an equal prompt as one row with all their references."""
    groups: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "prompt" not in row:
            return rows
        groups.setdefault(row["prompt"], {**row, "references": []})["references"].append(row["completion"])
    return list(groups.values()) if len(groups) < len(rows) else rows


def laid(path: Path, rows: list[dict[str, Any]]) -> str:
    """Rows written as a JSONL file beside the run; its name."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def trained(plan: dict[str, Any], place: Path, data: Path, training: str) -> dict[str, Any]:
    """Train what the recipe says, resuming a stopped run; how many steps it took."""
    values = plan["recipe"] | {"data": training, "out": str(place / "run")}
    if "general" in values:
        values["general"] = str(data / values["general"])
    if "valid" in plan:
        values["valid"] = laid(place / "valid.jsonl", rows_of(data / plan["valid"], plan.get("valid_rows")))
    outcome = prepare(Recipe.parse(values)).run(told, print)
    return {"steps": outcome.steps, "best_step": outcome.best_step, "costs": costs(place / "run/log.jsonl")}


def costs(log: Path) -> dict[str, float]:
    """Seconds of all steps, whatever process took them, of them those of the KL; and those the guard watched."""
    steps = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return {
        key: round(sum(step.get(key) or 0 for step in steps), 1) for key in ("seconds", "kl_seconds", "watch_seconds")
    }


def looks(log: Path) -> list[dict[str, float]]:
    """What the guard saw at each validation."""
    steps = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    kept = ("step", "valid_loss", "general_rise", "general_kl")
    return [{key: step[key] for key in kept if key in step} for step in steps if "general_rise" in step]


def shrunk(plan: dict[str, Any], place: Path, out: Path, name: str) -> dict[str, Any]:
    """Cut the ranks of another run of the set; how far its ΔW moved."""
    other = out / Path(name).parent / plan["shrink"]["of"] / "run/adapter"
    if not other.is_dir():
        raise SystemExit(f"{name}: run {plan['shrink']['of']} first; {other} is not there")
    found = shrink(load_adapter(other), rank=plan["shrink"]["rank"])
    shutil.rmtree(place / "run", ignore_errors=True)
    save_adapter(found.adapter, place / "run/adapter")
    return {"update_moved": found.error}


def run(name: str, data: Path, out: Path) -> None:
    """Train (or shrink) and judge one experiment; its result is NAME.json beside the recipe."""
    plan = experiment(name)
    place = out / name
    training = laid(place / "train.jsonl", rows_of(data / plan["train"], plan.get("train_rows")))
    target = laid(place / "test.jsonl", questions(rows_of(data / plan["test"], plan.get("test_rows"))))
    began = time.perf_counter()
    try:
        done = shrunk(plan, place, out, name) if "shrink" in plan else trained(plan, place, data, training)
    except RunError as refusal:  # the guard found no state to keep: that is a result too
        log = place / "run/log.jsonl"
        write_json(HERE / f"{name}.json", within({"experiment": plan, "refused": str(refusal), "looks": looks(log),
                                                  "costs": costs(log), "machine": machine()}, data, out))  # fmt: skip
        print(name, refusal)
        return
    seconds = time.perf_counter() - began
    recipe = Recipe.parse(plan["recipe"] | {"data": training, "out": str(place / "run")})
    method = recipe.training.method
    quant = "nf4" if method == "qlora" else recipe.quant  # a QLoRA adapter is judged on the base it was trained on
    base = load_base(recipe.base, dtype=plan.get("judge_dtype", recipe.dtype), quant=quant)
    options = JudgeOptions.parse(plan["judge"])
    files = {key: str(data / plan[key]) if key in plan else None for key in ("general_text", "pairs", "choices")}
    made = place / "run" / ("model" if method == "full" else "adapter")
    began = time.perf_counter()
    card = judge(
        base, made, target=target, general=files["general_text"],
        pairs=files["pairs"], choices=files["choices"], train=training, options=options,
        predictions=place / "predictions.jsonl",
    )  # fmt: skip
    result = {
        "experiment": plan,
        "card": card.model_dump(mode="json", exclude={"command"}),
        **done,
        "train_seconds": round(seconds, 1),
        "judge_seconds": round(time.perf_counter() - began, 1),
        "machine": machine(),
    }
    write_json(HERE / f"{name}.json", within(result, data, out))
    for path, measure in {"target": card.target, **card.general}.items():
        if measure is not None:
            for key, one in measure.measures.items():
                print(name, path, key, f"{one.base.value:.4g} -> {one.adapter.value:.4g}", one.verdict)


def within(result: dict[str, Any], *folders: Path) -> Any:
    """The result with its files named within these folders, wherever they lie on this machine."""
    text = json.dumps(result)
    for folder in folders:
        text = text.replace(f"{folder}/", "")
    return json.loads(text)


def told(event: dict[str, Any]) -> None:
    """One line a step."""
    print(event["step"], event["total_steps"], round(event["loss"], 3), event["seconds"], flush=True)


def named(given: str) -> list[str]:
    """A set's experiments, or the one that is named."""
    if (HERE / given).is_dir():
        return [f"{given}/{path.stem}" for path in sorted((HERE / given).glob("*.yaml")) if path.stem != "common"]
    return [given]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", help="SET or SET/NAME")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    asked = parser.parse_args()
    for one in [name for given in asked.names for name in named(given)]:
        if asked.again or not (HERE / f"{one}.json").is_file():
            run(one, asked.data, asked.out)
