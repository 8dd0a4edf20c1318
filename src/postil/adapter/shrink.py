"""shrink: an adapter of smaller rank whose ΔW are the nearest there are, by truncated SVD."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from postil.adapter.adapter import Adapter
from postil.adapter.config import LoraConfig
from postil.adapter.spectrum import Delta, deltas, rank_for, svd_of
from postil.errors import AdapterError

STALE = ("score_card", "result")  # of a card: they were measured of other tensors


@dataclass(frozen=True, slots=True)
class Shrunk:
    """The smaller adapter. ranks: module → (before, after); errors: module → |ΔW - ΔW'| / |ΔW| (Frobenius, 0 for a
    ΔW that is zero); error: the same over all modules together."""

    adapter: Adapter
    ranks: dict[str, tuple[int, int]]
    errors: dict[str, float]
    error: float


@torch.no_grad()
def shrink(adapter: Adapter, *, rank: int | None = None, keep: float | None = None) -> Shrunk:
    """Cut every module's ΔW = s·B·A to `rank`, or to the fewest ranks that keep the share `keep` of its energy Σ σ².

    The first k singular triplets are the nearest matrix of rank k in the Frobenius and spectral norms (Eckart & Young
    1936; Mirsky 1960): B' = U_k √σ_k, A' = √σ_k V_kᵀ, with the scale s in them, so that the new adapter has alpha = r
    everywhere and no rsLoRA. A module's rank never grows; ranks that differ stand in rank_pattern. Biases and modules
    saved whole stay as they are. Raises AdapterError unless exactly one of rank >= 1 and 0 < keep <= 1 is given.
    """
    if (rank is None) == (keep is None):
        raise AdapterError("give either a rank or the share of energy to keep: --rank 8, or --keep 99%")
    if rank is not None and rank < 1:
        raise AdapterError(f"a rank of {rank} leaves nothing; give 1 or more")
    if keep is not None and not 0 < keep <= 1:
        raise AdapterError(f"the share of energy to keep lies above 0 and is at most 1 (100%), found {keep:g}")
    tensors = dict(adapter.tensors)
    ranks: dict[str, tuple[int, int]] = {}
    errors: dict[str, float] = {}
    lost = held = 0.0
    for delta in deltas(adapter):
        u, values, vh = svd_of(delta)
        before = delta.a.shape[0]
        after = min(before, rank or max(rank_for(values, keep or 1.0), 1))
        tensors |= _cut(delta, u, values, vh, after, adapter.tensors)
        total, tail = (float(part.square().sum()) for part in (values, values[after:]))
        ranks[delta.path], errors[delta.path] = (before, after), math.sqrt(tail / total) if total else 0.0
        lost, held = lost + tail, held + total
    error = math.sqrt(lost / held) if held else 0.0
    config = _config(adapter.config, {path: after for path, (_, after) in ranks.items()})
    card: dict[str, Any] = {key: value for key, value in adapter.card.items() if key not in STALE}
    card["shrunk"] = {"rank": rank, "keep": keep, "relative_error": error}
    return Shrunk(Adapter(config, tensors, adapter.base, adapter.base_name, card), ranks, errors, error)


def _cut(
    delta: Delta,
    u: Float[torch.Tensor, "d_out k"],
    values: Float[torch.Tensor, " k"],
    vh: Float[torch.Tensor, "k d_in"],
    rank: int,
    tensors: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """The module's new A and B by key, in the dtypes of the old; ranks beyond what ΔW can have are zero."""
    ends = ("lora_embedding_A", "lora_embedding_B") if delta.embedding else ("lora_A.weight", "lora_B.weight")
    key_a, key_b = (f"{delta.path}.{end}" for end in ends)
    roots = values[:rank].sqrt()
    a = delta.a.new_zeros(rank, delta.a.shape[1])
    b = delta.b.new_zeros(delta.b.shape[0], rank)
    a[: len(roots)] = roots[:, None] * vh[:rank]
    b[:, : len(roots)] = u[:, :rank] * roots
    return {key_a: a.to(tensors[key_a].dtype), key_b: b.to(tensors[key_b].dtype)}


def _config(config: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """alpha = r at every module, so that the scale is 1; the most common rank is the configuration's own."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    other = {re.escape(path): rank for path, rank in ranks.items() if rank != common}
    return LoraConfig(
        **config.model_dump()
        | {
            "r": common,
            "alpha": float(common),
            "use_rslora": False,
            "rank_pattern": other,
            "alpha_pattern": {path: float(rank) for path, rank in other.items()},
        }
    )
