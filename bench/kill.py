"""Kill -9 a training run at ten moments, resume it each time, and compare its bytes with an unbroken run's.

Moments: inside a checkpoint write, inside an accumulation, and eight at random over the whole run; dropout and
shuffling on. `python bench/kill.py` prints the moments and whether the bytes are equal, and writes the JSON.
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
from pathlib import Path
from typing import Any

from postil.files import write_json

RESULT = Path(__file__).parent / "results" / "kill.json"

CHILD = """
import sys, time, json, hashlib
import torch
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
print("start", flush=True)
train(model, data, out=sys.argv[1], epochs=2, batch_size=8, accumulation=2, checkpoint_every=2, warmup=2,
      watch=lambda event: print("step", event["step"], flush=True))
flat = model.resident("default").flat
print("bytes", hashlib.sha256(flat.numpy().tobytes()).hexdigest(), flush=True)
"""


def run(out: Path, kill: str | None, seconds: float = 0.0) -> tuple[str | None, str]:
    """One process, killed `seconds` after its start or at "write" / "accumulation": (digest or None, where)."""
    command = [sys.executable, "-u", "-c", CHILD, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        text, began, digest = b"", None, None
        while process.poll() is None:
            text += process.stdout.read() or b""
            lines = text.decode().splitlines()
            if began is None and "start" in lines:
                began = time.perf_counter()
            micro = sum(line == "micro" for line in lines)
            writing = any((out / "checkpoints").glob(".postil-tmp-*"))
            now = began is not None and time.perf_counter() - began >= seconds
            if (
                (kill == "write" and writing)
                or (kill == "accumulation" and micro % 2 == 0 and micro > 4 and lines[-1] == "micro")
                or (kill == "time" and now)
            ):
                os.kill(process.pid, signal.SIGKILL)
                where = "inside a checkpoint write" if writing else f"after {lines[-1] if lines else 'nothing'}"
                return None, f"{where}, {micro} packs into this process"
            time.sleep(0.0005)
        text += process.stdout.read() or b""
        for line in text.decode().splitlines():
            if line.startswith("bytes "):
                digest = line.split()[1]
    return digest, "ran to its end"


def main() -> int:
    """The whole measurement; exit code 1 where the bytes differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    chosen = random.Random(parser.parse_args().seed)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        whole, _ = run(Path(folder) / "whole", None)
        length = time.perf_counter() - began
        moments: list[str] = []
        broken = Path(folder) / "broken"
        kinds = ["write", "accumulation", *["time"] * 8]
        chosen.shuffle(kinds)
        for kind in kinds:
            _digest, where = run(broken, kind, chosen.uniform(0, 0.35 * length))
            moments.append(f"{kind}: {where}")
            print(moments[-1], flush=True)
        final, _ = run(broken, None)
        steps = [json.loads(line)["step"] for line in (broken / "log.jsonl").read_text().splitlines()]
    result: dict[str, Any] = {
        "moments": moments,
        "unbroken": whole,
        "resumed": final,
        "equal": whole is not None and whole == final,
        "log_steps_in_order": steps == list(range(1, len(steps) + 1)),
        "recipe_sha256": hashlib.sha256(CHILD.encode()).hexdigest()[:16],
    }
    write_json(RESULT, result)
    print(json.dumps(result, indent=1))
    return 0 if result["equal"] and result["log_steps_in_order"] else 1


if __name__ == "__main__":
    sys.exit(main())
