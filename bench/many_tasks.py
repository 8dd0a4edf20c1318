"""Fifty small tasks: the plain default beside a grid of rate × epochs, one result file a task in recipes/many_tasks/.

Half A (even places of the sorted names) is chosen on, half B reported on. `python bench/many_tasks.py grid --half
B` runs the grid task by task, the smallest first, and writes each point as it is done; a point that is there is not
run again, so that a run may be broken off and go on anywhere. `default --half B` trains what the plain command line
trains (postil train --base B --data F), without the file of held-out rows that the grid has; `verdict --half B`
judges it. The data lie in many_tasks/ and general/ of the folder given by --data.

Rules that spare work, fixed before the first run:
1. A task where a point scores 100 needs no further point.
2. At each number of epochs the two middle rates are run, then the outer one beside the better of the two (by score;
   at equal scores by held-out loss): nine of the twelve points, the other three taken to be no better.
3. Held-out rows are looked at once an epoch; a run ends after PATIENCE looks without gain, its best state is kept.
A row of exact_match or accuracy counts where each token of a wanted answer, its end included, is the likeliest: then
greedy decoding says just that. slot_f1 is of greedy answers. Seconds are of the processor, in one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from main_job import machine, rows_of
from postil.adapter import AdaptedModel, LoraConfig, attach
from postil.base import load_base
from postil.data import Sample, load_data
from postil.engine import Engine, Request
from postil.files import write_json
from postil.judging.asking.likelihoods import mean_nats, row_losses, token_scores, windows
from postil.judging.judge import judge
from postil.settings import with_settings
from postil.training import TrainOptions
from postil.training.loop import Outcome, run
from postil.training.recipe import Recipe, prepare

BASE, DTYPE = "smollm2-135m-instruct", "bfloat16"
HERE = Path(__file__).parents[1] / "recipes" / "many_tasks"
SET, LIST = "many_tasks", "many_tasks/tasks.json"
RATES, EPOCHS = (3e-4, 1e-3, 3e-3, 1e-2), (3, 10, 1)  # the order in which they are run
PATIENCE = 3
GENERAL_TOKENS, WINDOW = 2_000, 512
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """A task's rows as they lie in its folder."""

    name: str
    metric: str
    half: str
    train: list[Json]
    valid: list[Json]
    test: list[Json]


def names(data: Path, half: str) -> list[str]:
    """A half's tasks in the order of work: those with the fewest bytes to train on first."""
    every = sorted(one["task"] for one in json.loads((data / LIST).read_text(encoding="utf-8")))
    return sorted(every["AB".index(half) :: 2], key=lambda name: (data / SET / name / "train.jsonl").stat().st_size)


def read_task(data: Path, name: str, half: str) -> Task:
    """One task."""
    listed = json.loads((data / LIST).read_text(encoding="utf-8"))
    (metric,) = (one["metric"] for one in listed if one["task"] == name)
    parts = (rows_of(data / SET / name / f"{part}.jsonl") for part in ("train", "valid", "test"))
    return Task(name, metric, half, *parts)


class Result:
    """A task's result file, written after every point."""

    def __init__(self, task: Task) -> None:
        self.path = HERE / f"{task.name}.json"
        if self.path.is_file():
            self.values: Json = json.loads(self.path.read_text(encoding="utf-8"))
        else:
            self.values = {"task": task.name, "metric": task.metric, "half": task.half, "grid": {}}

    def put(self, **values: Any) -> None:
        """Add values and write the file."""
        self.values |= values | {"machine": machine()}
        write_json(self.path, self.values)


def samples_of(rows: Sequence[Json], model: AdaptedModel) -> list[Sample]:
    """Rows as they are learned."""
    plain = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    return list(load_data(plain, model.base).samples)


def score(model: AdaptedModel, task: Task, adapter: str | None) -> float:
    """The task's measure over its test rows, 0 to 100."""
    if task.metric == "slot_f1":
        return slot_f1(answers(model, task, adapter), [row["completion"] for row in task.test])
    wanted = [(place, text) for place, row in enumerate(task.test) for text in row.get("accept", [row["completion"]])]
    rows = [{"prompt": task.test[place]["prompt"], "completion": text} for place, text in wanted]
    found = token_scores(model, samples_of(rows, model), adapter)
    right = {place for (place, _), (_, likeliest) in zip(wanted, found, strict=True) if likeliest}
    return 100 * len(right) / len(task.test)


def answers(model: AdaptedModel, task: Task, adapter: str | None) -> list[str]:
    """Greedy answers, the first line of each."""
    most = max(len(model.base.tokenizer(row["completion"])["input_ids"]) for row in (*task.train, *task.test))
    with Engine(model, max_batch=64) as engine:
        asked = [Request(prompt=row["prompt"], adapter=adapter, max_new_tokens=most + 8, stop=("\n",))
                 for row in task.test]  # fmt: skip
        return [answer.text.strip() for answer in engine.run(asked)]


def slot_f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    """Micro F1 over the `slot: value` pairs of all rows."""
    pairs = [[Counter(part.strip() for part in text.split(";") if part.strip()) for text in (one, other)]
             for one, other in zip(said, wanted, strict=True)]  # fmt: skip
    hits = sum((one & other).total() for one, other in pairs)
    return 200 * hits / max(sum(one.total() + other.total() for one, other in pairs), 1)


class Damage:
    """Nats per token over the base on the first tokens of WikiText-2, which no run holds to or watches."""

    def __init__(self, model: AdaptedModel, data: Path) -> None:
        texts = [row["text"] for row in rows_of(data / "general" / "wikitext2_valid.jsonl")]
        self.text = windows(model.base.tokenizer, texts, GENERAL_TOKENS, WINDOW)
        self.base = mean_nats(row_losses(model, self.text, None))

    def of(self, model: AdaptedModel, adapter: str) -> float:
        """The rise."""
        return mean_nats(row_losses(model, self.text, adapter)) - self.base


def point(model: AdaptedModel, task: Task, damage: Damage, rate: float, epochs: int) -> Json:
    """Train one point of the grid and measure it."""
    training, valid = samples_of(task.train, model), samples_of(task.valid, model)
    steps = -(-len(training) // 8)
    options = TrainOptions(
        learning_rate=rate, epochs=epochs, batch_size=8, valid_every=steps, valid_rows=len(valid), patience=PATIENCE
    )
    attach(model, LoraConfig(), name="note", seed=options.seed)
    looks: list[float] = []
    began = time.process_time()
    outcome = run(
        model, training, valid, out=None, name="note", options=options,
        watch=lambda event: looks.append(round(event["valid_loss"], 4)) if "valid_loss" in event else None,
    )  # fmt: skip
    seconds = time.process_time() - began
    found = measured(model, task, damage, outcome, seconds, "note") | {"looks": looks}
    model.remove("note")
    return {"rate": rate, "epochs": epochs, **found}


def measured(model: AdaptedModel, task: Task, damage: Damage, outcome: Outcome, seconds: float, adapter: str) -> Json:
    """The figures of a resident note as training left it."""
    return {
        "score": round(score(model, task, adapter), 2), "valid_loss": outcome.valid_loss, "steps": outcome.steps,
        "best_step": outcome.best_step, "wikitext_rise": round(damage.of(model, adapter), 4),
        "seconds": round(seconds, 1),
    }  # fmt: skip


def points(found: dict[str, Json], passes: Sequence[int]) -> Iterator[tuple[float, int]]:
    """The grid in the order of work, by the rules above; `found` grows as it goes on. passes: these epochs alone."""
    for epochs in passes:
        low, high = RATES[1:3]
        for rate in (low, high):
            yield rate, epochs
        one, other = found[key(low, epochs)], found[key(high, epochs)]
        downhill = (-one["score"], one["valid_loss"]) < (-other["score"], other["valid_loss"])
        yield (RATES[0] if downhill else RATES[3]), epochs


def key(rate: float, epochs: int) -> str:
    """A point's name in a result file."""
    return f"{rate:g} x {epochs}"


def grid(model: AdaptedModel, damage: Damage, task: Task, passes: Sequence[int]) -> None:
    """The grid's points of one task that are not there yet."""
    result = Result(task)
    found = result.values["grid"]
    for rate, epochs in points(found, passes):
        if any(one["score"] == 100 for one in found.values()):
            break
        if key(rate, epochs) not in found:
            found[key(rate, epochs)] = point(model, task, damage, rate, epochs)
            result.put(grid=found)
            print(time.strftime("%H:%M"), task.name, found[key(rate, epochs)], flush=True)
    if set(passes) == set(EPOCHS):
        result.put(grid_done=True)


def default(task: Task, data: Path, out: Path, settings: list[str]) -> None:
    """The plain default, as the command line runs it, where it is not there yet; settings: what is not plain."""
    result = Result(task)
    if "default" in result.values:
        return
    place = out / task.name
    plain = {"base": BASE, "data": str(data / SET / task.name / "train.jsonl"), "out": str(place)}
    job = prepare(Recipe.parse(with_settings(plain, settings)))
    damage = Damage(job.model, data)
    said: list[str] = []
    began = time.process_time()
    outcome = job.run(tell=said.append)
    seconds = time.process_time() - began
    found = measured(job.model, task, damage, outcome, seconds, "default")
    kept = {
        "learning_rate",
        "epochs",
        "batch_size",
        "patience",
        "valid_rows",
        "kl_weight",
        "kl_rows",
        "general_tokens",
    }
    found |= {"set": settings, "rows": len(job.training), "why": [*job.why, *said],
              "chosen": {key: value for key, value in job.options.model_dump().items() if key in kept}}  # fmt: skip
    result.put(default=found)
    print(time.strftime("%H:%M"), task.name, found, flush=True)


def verdict(task: Task, data: Path, out: Path) -> None:
    """What `postil judge --train` says of the default's note on the test rows, beside the trivial baselines."""
    result, folder = Result(task), data / SET / task.name
    if "default" not in result.values or "verdict" in result.values:
        return
    card = judge(
        load_base(BASE), out / task.name / "adapter", target=str(folder / "test.jsonl"), general=None, chat=None,
        train=str(folder / "train.jsonl"), keep=False,
    )  # fmt: skip
    part = card.target
    if part is None:
        raise SystemExit(f"{task.name}: the card has no target")
    name, beside = part.best_baseline or ("", part.measures[part.main])
    found = {"main": part.main, "verdict": part.verdict, "base": part.measures[part.main].base.value,
             "note": beside.adapter.value, "baseline": name, "baseline_value": beside.base.value}  # fmt: skip
    result.put(verdict=found)
    print(time.strftime("%H:%M"), task.name, found, flush=True)


def main() -> None:
    """Work through one half."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=["grid", "default", "verdict"])
    parser.add_argument("--half", choices=["A", "B"], required=True)
    parser.add_argument("--only", nargs="+", help="tasks of the half, in this order")
    parser.add_argument(
        "--epochs", nargs="+", type=int, choices=EPOCHS, default=EPOCHS, help="of the grid, these alone"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], help="of the default's recipe, where it is not plain: key=value"
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/many_tasks"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = asked.data
    tasks = [read_task(data, name, asked.half) for name in asked.only or names(data, asked.half)]
    if asked.job in ("default", "verdict"):
        for task in tasks:
            if asked.job == "default":
                default(task, data, asked.out, asked.set)
            else:
                verdict(task, data, asked.out)
        return
    model = attach(load_base(BASE, dtype=DTYPE))
    damage = Damage(model, data)
    for task in tasks:
        grid(model, damage, task, asked.epochs)


if __name__ == "__main__":
    main()
