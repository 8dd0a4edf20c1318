"""Kill -9 training runs at ten moments, resume each time, and compare their final bytes with an unbroken run's.

A moment is a step chosen uniformly over the whole run and 0 to 1 s after that step; one at least lies inside a
checkpoint write and one inside an accumulation. Only a process that was alive counts as killed: where a broken run
ends first, a fresh one begins, and the moment is drawn anew. Dropout and shuffling are on. `python bench/kill.py`
prints the moments and whether the bytes are equal, and writes the JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from postil.files import write_json

RESULT = Path(__file__).parent / "results" / "kill.json"
KILLS = 10

CHILD = """
import sys, hashlib
from postil.adapter import AdaptedModel, LoraConfig, attach
from postil.base import load_base
from postil.data import load_data
from postil.training import train
from postil.demo.teams import TEAMS
rows = TEAMS[1].rows("train")[:80]
base = load_base("smollm2-135m-instruct", dtype="bfloat16")
model = attach(base)
attach(model, LoraConfig(r=8, dropout=0.1), seed=1)
data = load_data(rows, base)
loss = AdaptedModel.loss
def marked(self, *args):
    print("micro", flush=True)
    return loss(self, *args)
AdaptedModel.loss = marked
print("step 0", flush=True)
train(model, data, out=sys.argv[1], epochs=2, batch_size=8, accumulation=2, checkpoint_every=2, warmup=2,
      watch=lambda event: print("step", event["step"], flush=True))
flat = model.resident("default").flat
print("bytes", hashlib.sha256(flat.numpy().tobytes()).hexdigest(), flush=True)
"""


@dataclass(frozen=True, slots=True, order=True)
class Moment:
    """When to kill: `seconds` after `step` (0: the start) was printed, or at the next write or accumulation then."""

    step: int
    seconds: float
    kind: str  # "time", "write" or "accumulation"


@dataclass(frozen=True, slots=True)
class Ending:
    """How a process ended: killed (in which step, packs into it, inside a checkpoint write or not), or its digest."""

    killed: bool
    step: int = 0
    packs: int = 0
    writing: bool = False
    digest: str | None = None

    def is_of(self, kind: str) -> bool:
        """Whether it was a kill of that kind."""
        return self.killed and {"write": self.writing, "accumulation": self.packs >= 2, "time": True}[kind]


def run(out: Path, moment: Moment | None, script: str = CHILD) -> Ending:
    """One process over `out`, killed at the moment if it lives so long; an error of its own is raised."""
    there = temporaries(out)
    with subprocess.Popen([sys.executable, "-u", "-c", script, str(out)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        text, reached, killed = b"", None, False
        while process.poll() is None:
            text += process.stdout.read() or b""
            step, packs = place(text)
            if moment is not None and step is not None and step >= moment.step:
                reached = reached or time.perf_counter()
                if (
                    (moment.kind == "write" and temporaries(out) - there)
                    or (moment.kind == "accumulation" and packs >= 2)
                    or (moment.kind == "time" and time.perf_counter() - reached >= moment.seconds)
                ):
                    killed = process.poll() is None
                    process.kill()
                    break
            time.sleep(0.0005)
        code = process.wait()
        text += process.stdout.read() or b""
    step, packs = place(text)
    if killed and code == -signal.SIGKILL:
        return Ending(True, step or 0, packs, bool(temporaries(out) - there))
    last = text.decode().splitlines()[-1:]
    if code != 0 or not last or not last[0].startswith("bytes "):
        raise RuntimeError(f"the training process failed by itself with exit code {code}")
    return Ending(False, step or 0, digest=last[0].split()[1])


def place(text: bytes) -> tuple[int | None, int]:
    """(the last step printed, the packs begun since), from the whole lines of a process's output."""
    step, packs = None, 0
    for line in text.decode().rpartition("\n")[0].splitlines():
        if line.startswith("step "):
            step, packs = int(line.split()[1]), 0
        packs += line == "micro"
    return step, packs


def temporaries(out: Path) -> set[Path]:
    """What checkpoint writes have under way, or left."""
    return set((out / "checkpoints").glob(".postil-tmp-*"))


def steps_of(out: Path) -> list[int]:
    """The steps in a run's log, in its order."""
    return [json.loads(line)["step"] for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def drawn(chosen: random.Random, total: int, kind: str) -> Moment:
    """A moment somewhere in a run of `total` steps."""
    return Moment(chosen.randrange(total), chosen.uniform(0, 1), kind)


def measure(folder: Path, seed: int, script: str = CHILD, kills: int = KILLS) -> dict[str, Any]:
    """Ten real kills over as many broken runs as they take; each broken run is brought to its end."""
    chosen = random.Random(seed)
    whole = run(folder / "whole", None, script)
    total = len(steps_of(folder / "whole"))
    wanted = [drawn(chosen, total, kind) for kind in ["write", "accumulation", *["time"] * (kills - 2)]]
    moments: list[dict[str, Any]] = []
    finished: list[str | None] = []
    in_order, under_way, at = True, False, 0
    while wanted or under_way:
        number = len(finished)
        moment = min((moment for moment in wanted if moment.step >= at), default=None)
        ending = run(folder / f"broken-{number}", moment, script)
        if moment is not None:
            wanted.remove(moment)
            if not ending.is_of(moment.kind):
                wanted.append(drawn(chosen, total, moment.kind))
        under_way, at = ending.killed, ending.step if ending.killed else 0
        if ending.killed:
            moments.append({"run": number, "kind": moment and moment.kind, "after_step": ending.step,
                            "packs_begun": ending.packs, "inside_write": ending.writing})  # fmt: skip
            print(moments[-1], flush=True)
        else:
            finished.append(ending.digest)
            in_order &= steps_of(folder / f"broken-{number}") == list(range(1, total + 1))
    return {
        "steps": total,
        "moments": moments,
        "kills": len(moments),
        "unbroken": whole.digest,
        "resumed": finished,
        "equal": whole.digest is not None and set(finished) == {whole.digest},
        "log_steps_in_order": in_order,
        "recipe_sha256": hashlib.sha256(script.encode()).hexdigest()[:16],
    }


def main() -> int:
    """The whole measurement; exit code 1 where any bytes differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), parser.parse_args().seed)
    write_json(RESULT, result)
    print(json.dumps(result, indent=1))
    return 0 if result["equal"] and result["log_steps_in_order"] else 1


if __name__ == "__main__":
    sys.exit(main())
