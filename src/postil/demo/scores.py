"""Nats per token of test rows and of general text, for an adapter or the bare base."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import torch

from postil.adapter import AdaptedModel
from postil.data import Sample, pack
from postil.kernels.layout import Layout

PACK_TOKENS = 2048
WINDOW = 512


@dataclass(frozen=True, slots=True)
class Gain:
    """A paired difference per row with its 95% interval (normal approximation), positive when better."""

    mean: float
    low: float
    high: float

    @property
    def real(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0


@torch.no_grad()
def row_losses(model: AdaptedModel, samples: Sequence[Sample], adapter: str | None) -> list[tuple[float, int]]:
    """Per sample (sum of nats over its target tokens, number of target tokens)."""
    out: list[tuple[float, int]] = []
    for group in _budgeted(samples):
        packed = pack(group)
        spans = model.spans_for({} if adapter is None else {adapter: 1.0}, len(packed.ids))
        ids, positions = torch.from_numpy(packed.ids), torch.from_numpy(packed.positions)
        device = model.base.device
        with model.using(Layout.packed(packed.lengths, spans)):
            _, nll, targets = model.loss(
                ids.to(device), positions.to(device), torch.from_numpy(packed.weights).to(device)
            )
        owner = np.repeat(np.arange(len(group)), packed.lengths)[targets.cpu().numpy()]
        sums = np.bincount(owner, nll.double().cpu().numpy(), minlength=len(group))
        counts = np.bincount(owner, minlength=len(group))
        out += [(float(total), int(count)) for total, count in zip(sums, counts, strict=True)]
    return out


def _budgeted(samples: Sequence[Sample]) -> list[list[Sample]]:
    groups: list[list[Sample]] = [[]]
    for sample in samples:
        if groups[-1] and sum(len(s.ids) for s in groups[-1]) + len(sample.ids) > PACK_TOKENS:
            groups.append([])
        groups[-1].append(sample)
    return [group for group in groups if group]


def mean_nats(losses: Sequence[tuple[float, int]]) -> float:
    """Nats per target token over all rows."""
    return sum(total for total, _ in losses) / max(sum(count for _, count in losses), 1)


def gain(base: Sequence[tuple[float, int]], adapted: Sequence[tuple[float, int]]) -> Gain:
    """By how many nats per token the adapter is better, row by row, with its interval."""
    differences = np.array([(b - a) / max(n, 1) for (b, n), (a, _) in zip(base, adapted, strict=True)])
    mean = float(differences.mean())
    half = 1.96 * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return Gain(mean, mean - half, mean + half)


def general_windows(model: AdaptedModel, tokens: int) -> list[Sample]:
    """The general sample that ships with postil as windows of 512 tokens, `tokens` or a little more in all."""
    text = (files("postil.data") / "samples" / "general.jsonl").read_text(encoding="utf-8")
    documents = [json.loads(line)["text"] for line in text.splitlines()]
    ids = model.base.tokenizer("\n\n".join(documents), add_special_tokens=False, verbose=False)["input_ids"]
    windows = []
    for start in range(0, min(len(ids), tokens), WINDOW):
        window = np.array(ids[start : start + WINDOW], dtype=np.int32)
        if len(window) > 1:
            weights = np.ones(len(window), dtype=np.float32)
            weights[0] = 0
            windows.append(Sample(window, weights, start))
    return windows
