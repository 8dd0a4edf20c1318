"""Resident adapters: one flat float32 buffer each, its A, B and saved parameters leaf views into it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from postil.adapter.config import LoraConfig
from postil.adapter.targets import Target
from postil.errors import AdapterError, listed
from postil.kernels.adapted_linear import AdapterSlot
from postil.seeds import derive

ALIGN = 16  # float32 numbers: every view starts on a 64-byte boundary


@dataclass(slots=True)
class EmbeddingSlot:
    """One adapter's part in an embedding: y += s·(A[:, ids])^T B^T; a [rank, vocabulary], b [dim, rank]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


@dataclass(slots=True)
class Resident:
    """An adapter inside a model.

    slot: a number of its own, which never comes again in that model, even after `remove`. flat: float32 [n], all its
    numbers; leaves: the views that autograd sees, by name; keys: PEFT key → view. groups, embeddings, saved: the same
    leaves as the model's modules need them. card: what is known of how it came
    to be, as in an Adapter; training begins it anew.
    """

    name: str
    slot: int
    config: LoraConfig
    targets: tuple[Target, ...]
    flat: torch.Tensor
    grad: torch.Tensor | None = None
    leaves: dict[str, torch.Tensor] = field(default_factory=dict)
    keys: dict[str, torch.Tensor] = field(default_factory=dict)
    groups: dict[str, AdapterSlot] = field(default_factory=dict)
    embeddings: dict[str, EmbeddingSlot] = field(default_factory=dict)
    saved: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """The number of numbers of the adapter (the buffer's alignment gaps left out)."""
        return sum(leaf.numel() for leaf in self.leaves.values())

    @property
    def trainable(self) -> bool:
        """Whether gradients are recorded for it."""
        return self.grad is not None

    def train(self, on: bool = True) -> None:
        """Give every leaf a gradient view into one flat twin buffer, or take them away."""
        self.grad = torch.zeros_like(self.flat) if on else None
        for leaf in self.leaves.values():
            leaf.requires_grad_(on)
            leaf.grad = None
            if self.grad is not None:
                offset = leaf.storage_offset()
                leaf.grad = self.grad[offset : offset + leaf.numel()].view(leaf.shape)


def make_resident(
    name: str,
    slot: int,
    config: LoraConfig,
    targets: Sequence[Target],
    grouping: Mapping[str, tuple[str, ...]],
    replaced: Mapping[str, Mapping[str, torch.Tensor]],
    device: torch.device,
) -> Resident:
    """An adapter with its buffer laid out and every view made; values are zero.

    grouping: group name → the paths of all its members in order; replaced: module path → the base's
    parameters that the adapter replaces whole (modules_to_save, biases).
    """
    by_path = {target.path: target for target in targets}
    plan: list[tuple[str, tuple[int, ...]]] = []
    for group, members in grouping.items():
        mine = [by_path[path] for path in members if path in by_path]
        if mine:
            plan.append((f"{group}.a", (sum(t.rank for t in mine), mine[0].d_in)))
            plan += [(f"{t.path}.b", (t.d_out, t.rank)) for t in mine]
    for target in targets:
        if target.kind == "embedding":
            plan.append((f"{target.path}.a", (target.rank, target.d_in)))
            plan.append((f"{target.path}.b", (target.d_out, target.rank)))
    for path, parameters in replaced.items():
        plan += [(f"{path}.{key}", tuple(value.shape)) for key, value in parameters.items()]
    offsets, end = [], 0
    for _, shape in plan:
        offsets.append(end)
        end += -(-math.prod(shape) // ALIGN) * ALIGN
    flat = torch.zeros(end, dtype=torch.float32, device=device)
    resident = Resident(name, slot, config, tuple(targets), flat)
    for (key, shape), offset in zip(plan, offsets, strict=True):
        resident.leaves[key] = flat[offset : offset + math.prod(shape)].view(shape).detach()
    _wire(resident, by_path, grouping, replaced)
    return resident


def _wire(
    resident: Resident,
    by_path: Mapping[str, Target],
    grouping: Mapping[str, tuple[str, ...]],
    replaced: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    leaves, keys = resident.leaves, resident.keys
    adapted_biases = set()
    for group, members in grouping.items():
        if f"{group}.a" not in leaves:
            continue
        a = leaves[f"{group}.a"]
        start = 0
        biases = []
        for path in members:
            bias = leaves.get(f"{path}.bias") if path in by_path else None
            biases.append(bias)
            if bias is not None:
                adapted_biases.add(path)
                keys[f"{path}.bias"] = bias
            if path in by_path:
                rank = by_path[path].rank
                keys[f"{path}.lora_A.weight"] = a[start : start + rank]
                keys[f"{path}.lora_B.weight"] = leaves[f"{path}.b"]
                start += rank
        resident.groups[group] = AdapterSlot(
            a=a,
            b=tuple(leaves.get(f"{path}.b") if path in by_path else None for path in members),
            scales=tuple(by_path[path].scale if path in by_path else 0.0 for path in members),
            biases=tuple(biases),
            dropout=resident.config.dropout,
        )
    for target in resident.targets:
        if target.kind == "embedding":
            a, b = leaves[f"{target.path}.a"], leaves[f"{target.path}.b"]
            resident.embeddings[target.path] = EmbeddingSlot(a, b, target.scale)
            keys[f"{target.path}.lora_embedding_A"] = a
            keys[f"{target.path}.lora_embedding_B"] = b
    for path, parameters in replaced.items():
        for key in parameters:
            keys[f"{path}.{key}"] = leaves[f"{path}.{key}"]
        if path not in adapted_biases:
            resident.saved[path] = {key: leaves[f"{path}.{key}"] for key in parameters}


def initialise(resident: Resident, replaced: Mapping[str, Mapping[str, torch.Tensor]], seed: int) -> None:
    """Fresh values: A uniform in ±1/√d_in (kaiming with a=√5) or normal with σ=1/r, B zero (Hu et al. 2021,
    section 4.1); an embedding's A zero, B normal; saved modules start as the base's. Each module has its own
    seed, so its values depend on no other."""
    for target in resident.targets:
        generator = torch.Generator().manual_seed(derive(seed, "init", target.path))
        if target.kind == "embedding":
            view = resident.keys[f"{target.path}.lora_embedding_B"]
            view.copy_(torch.randn(view.shape, generator=generator))
            continue
        view = resident.keys[f"{target.path}.lora_A.weight"]
        if resident.config.init == "gaussian":
            view.copy_(torch.randn(view.shape, generator=generator) / target.rank)
        else:
            view.copy_((torch.rand(view.shape, generator=generator) * 2 - 1) / math.sqrt(target.d_in))
    for path, parameters in replaced.items():
        for key, value in parameters.items():
            resident.keys[f"{path}.{key}"].copy_(value.detach())


def fill(
    resident: Resident,
    tensors: Mapping[str, torch.Tensor],
    spare: Iterable[str] = (),
) -> None:
    """Copy loaded tensors in, strictly: every key used, every wanted key found, every shape right.

    spare: keys that may be left over. Raises AdapterError that lists what was expected and what was found,
    or names a tensor with a value that is not finite.
    """
    missing = [key for key in resident.keys if key not in tensors]
    extra = [key for key in tensors if key not in resident.keys and key not in set(spare)]
    if missing or extra:
        raise AdapterError(
            f"the adapter's tensors do not fit its configuration and this base: "
            f"missing {listed(missing, 4)}; left over {listed(extra, 4)}; "
            f"{len(resident.keys)} were expected, {len(tensors)} found"
        )
    for key, view in resident.keys.items():
        tensor = tensors[key]
        if tensor.shape != view.shape:
            raise AdapterError(
                f"{key} has the shape {list(tensor.shape)}, but this base and configuration need "
                f"{list(view.shape)}; the adapter was made for another base or rank"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{key} holds NaN or infinite values; the adapter is broken, train it again")
        view.copy_(tensor)
