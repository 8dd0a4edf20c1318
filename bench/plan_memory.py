"""How near `postil plan` comes to the memory that training takes: full, LoRA and QLoRA on SmolLM2, on the CPU.

Each case trains in a process of its own; a thread reads RssAnon every 2 ms. Measured: its peak less what was resident
once the base was loaded (after malloc_trim, so that the loading's leftovers are not there for the training to use).
Planned: the same run's largest pack, by its sequences' lengths and target tokens, less the base's weights.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import subprocess
import sys
import threading
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "plan.json"
BASE = "smollm2-135m-instruct"
CASES: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "lora, all linear layers": {"method": "lora", "target_modules": "all-linear"},
    "lora, checkpointing": {"method": "lora", "gradient_checkpointing": True},
    "qlora": {"method": "qlora"},
    "full": {"method": "full"},
}
WIDE = "lora, windows"  # four windows of 512 tokens in a batch, in place of eight rows
CASES[WIDE] = {"method": "lora"}


def resident() -> int:
    """Anonymous resident bytes of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not say RssAnon in /proc/self/status")


def samples_of(base: Any, wide: bool, steps: int) -> list[Any]:
    """Rows of the demo's listings (about 60 tokens), or windows of the general sample (512)."""
    import numpy as np

    from postil.data import Sample, load_data
    from postil.demo.teams import TEAMS

    if not wide:
        return load_data(TEAMS[2].file("train"), base).samples[: 8 * steps]
    text = (files("postil.data") / "samples" / "general.jsonl").read_text(encoding="utf-8")
    joined = "\n\n".join(json.loads(line)["text"] for line in text.splitlines())
    ids = base.tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"]
    weights = np.ones(512, dtype=np.float32)
    weights[0] = 0
    return [Sample(np.array(ids[i * 512 : i * 512 + 512], dtype=np.int32), weights, i + 1) for i in range(4 * steps)]


def child(case: str, steps: int) -> dict[str, Any]:
    """Train `steps` updates of one case; its plan and its measured peak, in bytes beyond the base."""
    import torch

    from postil.adapter import LoraConfig, attach
    from postil.base import load_base
    from postil.data import epoch_steps
    from postil.planning.plan import PlanOptions, plan
    from postil.training import TrainOptions
    from postil.training.loop import run

    given = CASES[case]
    lora = LoraConfig(target_modules=given.get("target_modules"))
    wide = case == WIDE
    batch = 4 if wide else 8
    options = TrainOptions(
        method=given["method"], steps=steps, batch_size=batch, warmup=0,
        gradient_checkpointing=given.get("gradient_checkpointing", False),
    )  # fmt: skip
    base = load_base(BASE, dtype="bfloat16", quant="nf4" if given["method"] == "qlora" else None)
    samples = samples_of(base, wide, steps)
    packs = [
        pack
        for packs in epoch_steps(
            samples, batch_size=batch, accumulation=1, pack_tokens=options.pack_tokens,
            seed=options.seed, epoch=0,
        )
        for pack in packs
    ]  # fmt: skip
    largest = max(packs, key=lambda pack: len(pack.ids))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    start = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.perf_counter()
    model = attach(base)
    if given["method"] != "full":
        attach(model, lora)
    run(model, samples, [], out=None, name="default", options=options)
    seconds = time.perf_counter() - began
    done.set()
    thread.join()
    planned = plan(
        BASE,
        PlanOptions(
            method=given["method"], lora=lora, dtype="bfloat16", device="cpu", lengths=largest.lengths,
            target_share=largest.target_tokens / len(largest.ids), held_out=False,
            gradient_checkpointing=options.gradient_checkpointing,
        ),
    )  # fmt: skip
    in_use = planned.memory.beside_weights - planned.memory.slack
    return {
        "steps": steps, "tokens": len(largest.ids), "sequences": len(largest.lengths),
        "planned_bytes": planned.memory.beside_weights, "measured_bytes": peak - start,
        "ratio": round(planned.memory.beside_weights / (peak - start), 4), "planned_in_use_bytes": in_use,
        "parts": planned.memory.parts, "moment": planned.memory.moment, "resident_after_loading_bytes": start,
        "threads": torch.get_num_threads(), "seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> int:
    """Every case asked for, in turn; prints plan, measured and ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--case", action="append", choices=list(CASES), help="repeatable; all by default")
    parser.add_argument("--child", choices=list(CASES), help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.child:
        print(json.dumps(child(words.child, words.steps)))
        return 0
    known: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    cases: dict[str, Any] = known.get("cases", {})
    for case in words.case or CASES:
        command = [sys.executable, __file__, "--child", case, "--steps", str(words.steps)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        cases[case] = json.loads(out.strip().splitlines()[-1])
        found = cases[case]
        print(
            f"{case:24}  {found['tokens']:5} tokens  planned {found['planned_bytes'] / 1e6:8.1f} MB  "
            f"measured {found['measured_bytes'] / 1e6:8.1f} MB  ratio {found['ratio']:.3f}",
            flush=True,
        )
        save(cases)
    return 0 if all(0.9 <= cases[case]["ratio"] <= 1.1 for case in words.case or CASES) else 1


def save(cases: dict[str, Any]) -> None:
    """The results with the machine that they were measured on."""
    from postil.files import write_json

    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    write_json(RESULT, {"base": BASE, "cpu": cpu, "libc": " ".join(platform.libc_ver()), "cases": cases})


if __name__ == "__main__":
    sys.exit(main())
