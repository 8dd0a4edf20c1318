"""Makers for the tests of the registry: adapters, records, a blob store that fails, a registry of format 1."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from postil.adapter import Adapter, LoraConfig
from postil.errors import Unavailable
from postil.registry.ports import Blobs
from postil.registry.version import Manifest, Record, digests_of


def small(seed: int, source: str = "sha256:base") -> Adapter:
    """An adapter of one module, r = 2, whose values follow from the seed."""
    draw = torch.Generator().manual_seed(seed)
    key = "model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {key.format("A"): torch.randn(2, 8, generator=draw), key.format("B"): torch.randn(8, 2, generator=draw)}
    base = {"source": source, "form": "fp32"}
    return Adapter(LoraConfig(r=2, alpha=8 + seed, target_modules=("q_proj",)), tensors, base, "a-base")


def format_1(root: Path, versions: dict[str, list[Path]]) -> dict[str, list[str]]:
    """A registry as postil wrote it before format 2: each name's adapters published in order, the last one live."""
    digests: dict[str, list[str]] = {name: [] for name in versions}
    for name, places in versions.items():
        lines = []
        for number, place in enumerate(places, 1):
            base = json.loads((place / "postil.json").read_text())["base"]
            manifest = Manifest(base=base, files=digests_of(place))
            kept = root / "versions" / manifest.digest
            shutil.copytree(place, kept, dirs_exist_ok=True)
            (kept / "version.json").write_text(json.dumps(manifest.model_dump(mode="json")))
            event = {"number": number, "action": "publish", "alias": "live", "version": manifest.digest,
                     "before": (digests[name] or [None])[-1], "gate": "target is better", "sentence": "passed: …",
                     "who": "somebody", "when": "2026-01-01T00:00:00+00:00"}  # fmt: skip
            digests[name].append(manifest.digest)
            lines.append(json.dumps(event) + "\n")
        folder = root / "aliases" / name
        folder.mkdir(parents=True)
        (folder / "live.json").write_text(lines[-1])
        (folder / "log.jsonl").write_text("".join(lines))
    (root / "registry.json").write_text(json.dumps({"format": 1}))
    return digests


def record(number: int = 0, files: dict[str, str] | None = None) -> Record:
    """What a catalog keeps of a version that nobody made."""
    return Record(manifest=Manifest(base={"source": f"base {number}"}, files=files or {}), card={"number": number})


@dataclass
class Failing:
    """A blob store that fails at its n-th use of one kind; a real one underneath."""

    blobs: Blobs
    puts: int = 99
    fetches: int = 99

    def has(self, digest: str) -> bool:
        return self.blobs.has(digest)

    def put(self, digest: str, source: Path) -> bool:
        self.puts -= 1
        if self.puts < 0:
            raise Unavailable("the blob store cannot be reached")
        return self.blobs.put(digest, source)

    def fetch(self, digest: str, target: Path) -> None:
        self.fetches -= 1
        if self.fetches < 0:
            target.write_bytes(b"half")
            raise Unavailable("the blob store cannot be reached")
        self.blobs.fetch(digest, target)

    def verify(self, digest: str) -> None:
        self.blobs.verify(digest)

    def sweep(self, keep: Collection[str], before: float, dry: bool = False) -> int:
        return self.blobs.sweep(keep, before, dry)
