"""Two publishers at one registry, one of them with a 2 GB adapter: what the other waits, and what the copy takes.

Makes an adapter of --gigabytes of real bytes with a score card, publishes it in a process of its own and meanwhile
publishes and promotes small ones here, under another name and under the same; and before that alone. Ends with an
error where a small one waited for the large one's copying. Writes bench/results/publishers.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from main_job import machine
from postil.adapter import Adapter, LoraConfig
from postil.adapter.identity import combined_sha256, update_card
from postil.adapter.peft_files import save_adapter
from postil.files import write_json
from postil.judging.card.model import Comparison, DataUsed, Estimate, Part, ScoreCard
from postil.registry import Policy, Registry
from postil.registry.version import digests_of

HERE = Path(__file__).parent
KEY = "model.layers.0.self_attn.q_proj.lora_{}.weight"
WIDTH = 4096
LARGE = """
import sys, time
from postil.registry import Registry
begun = time.monotonic()
digest = Registry(sys.argv[1]).publish(sys.argv[2], "large").digest
print(digest, time.monotonic() - begun)
"""


def adapter(place: Path, rank: int, seed: int) -> Path:
    """The directory of an adapter of one module, with a card that lets it through."""
    draw = torch.Generator().manual_seed(seed)
    block = torch.randn(min(rank, 256), WIDTH, generator=draw)
    a = block.repeat(rank // len(block), 1)
    base = {"source": "sha256:base", "form": "fp32"}
    config = LoraConfig(r=rank, alpha=16, target_modules=("q_proj",))
    save_adapter(Adapter(config, {KEY.format("A"): a, KEY.format("B"): a.T.contiguous()}, base, "a-base"), place)
    update_card(place, score_card=card(place).model_dump(mode="json"))
    return place


def card(place: Path) -> ScoreCard:
    """A card of the adapter's bytes with two measures that were never taken."""
    data = DataUsed(name="none", sha256="none", rows=100)
    return ScoreCard(
        base={"source": "sha256:base", "form": "fp32"},
        adapter_sha256=combined_sha256(digests_of(place)),
        target=Part(data=data, main="bleu", measures={"bleu": measure("bleu", 30, 60, 1)}),
        general={"nats": Part(data=data, main="nats", measures={"nats": measure("nats", 2.9, 2.91, 0.01)})},
        command="bench/publishers.py",
    )


def measure(metric: str, base: float, adapter: float, half: float) -> Comparison:
    """A comparison with intervals of one width."""

    def around(value: float) -> Estimate:
        return Estimate(value=value, low=value - half, high=value + half)

    return Comparison(
        metric=metric, better="higher" if metric == "bleu" else "lower", unit=metric, rows=100, base=around(base),
        adapter=around(adapter), difference=around(adapter - base), verdict="better", detectable=half,
    )  # fmt: skip


def small_ones(registry: Registry, places: list[Path], going: Callable[[int], bool]) -> dict[str, list[float]]:
    """Seconds of each act while it is `going`: small ones published and promoted, under another name than the large
    one's and under the same."""
    took: dict[str, list[float]] = {"small": [], "large": []}
    published: dict[str, list[str]] = {"small": [], "large": []}

    def act(number: int, name: str) -> None:
        alias = "canary"
        if number % 3 == 0:
            place = places[number // 3 % len(places)]
            published[name].append(registry.publish(place, name, alias=alias).digest)
        else:
            registry.promote(name, published[name][0 if number % 3 == 1 else -1], alias)

    number = 0
    while going(number):
        for name in took:
            begun = time.monotonic()
            act(number, name)
            took[name].append(time.monotonic() - begun)
        number += 1
        time.sleep(0.05)  # leave the machine to the other
    return took


def main() -> None:
    """Publish alone, then beside the large one; write what each waited."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    given = parser.parse_args()
    rank = int(given.gigabytes * 1e9 / (2 * WIDTH * 4)) // 256 * 256
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        large = adapter(root / "large", rank, 0)
        small = [adapter(root / f"small-{seed}", 8, seed) for seed in range(1, 5)]
        size = (large / "adapter_model.safetensors").stat().st_size
        registry = Registry(root / "notes")
        for name, alias in (("small", "canary"), ("large", "live"), ("large", "canary")):
            registry.set_policy(name, Policy(gate="general.nats < base + 0.05"), alias)
        alone = small_ones(registry, small, lambda number: number < 60)
        words = [sys.executable, "-c", LARGE, str(root / "notes"), str(large)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as other:
            beside = small_ones(registry, small, lambda _: other.poll() is None)
            digest, took = (other.communicate()[0] or "none 0").split()
        if other.returncode or registry.version("large@live").digest != digest or registry.verify():
            raise SystemExit("the large adapter was not published whole")
        longest = max(max(seconds) for seconds in beside.values())
        if longest > float(took) / 4:
            raise SystemExit(f"a small publication took {longest:.1f} s beside one of {took} s: it waited")
    result: dict[str, float] = {"bytes": size, "large_s": float(took)}
    for what, all_ in (("alone", alone), ("beside", beside)):
        for name, seconds in all_.items():
            known = {"acts": len(seconds), "median_s": statistics.median(seconds), "longest_s": max(seconds)}
            result |= {f"{what}_name_{name}_{key}": value for key, value in known.items()}
    write_json(HERE / "results/publishers.json", result | {"machine": machine()})
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
