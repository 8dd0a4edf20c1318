"""Where a step's memory peaks, and what it is made of there: traced with few layers and continued to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from postil.adapter import LoraConfig
from postil.planning.ledger import SLACK, Bytes
from postil.planning.step import traced_step, uniform, with_layers
from postil.settings import Settings

FEW, MORE = 2, 3  # layers traced where all are alike; first and last are among both


class Memory(Settings):
    """Bytes at the peak of a step, by what they are for. `moment`: forward, loss, backward or update.

    masters: what is trained, in float32 (an adapter's A and B, or a float32 copy of every weight). gradients: their
    float32 sum and, in full fine-tuning, those that the backward pass has made in the weights' dtype so far.
    optimiser: AdamW's two moments, float32. kept: the best state so far, float32. origin: the base beside a fully
    trained one, for comparing on general text. activations: what the forward pass
    keeps for the backward pass. loss: logits of one chunk and their gradient, and the hidden states' gradient.
    working: tensors in passing. slack: what the process and its heap hold beyond the tensors in use (CPU).
    """

    where: ClassVar[str] = "plan"

    weights: int
    masters: int
    gradients: int
    optimiser: int
    kept: int
    origin: int
    activations: int
    loss: int
    working: int
    slack: int
    moment: str

    @property
    def parts(self) -> dict[str, int]:
        """Part → bytes, in the order of a table."""
        return {key: value for key, value in self.model_dump().items() if key != "moment"}

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())

    @property
    def beside_weights(self) -> int:
        """Bytes beyond the loaded base: what a measurement of the peak sees rise."""
        return self.total - self.weights


@dataclass(frozen=True, slots=True)
class Step:
    """What decides a step's memory beside the base; see planning.step.traced_step."""

    method: str
    lora: LoraConfig
    lengths: Sequence[int]
    targets: int
    device: str
    checkpointing: bool
    kept: bool
    general: bool


def peak_of(config: Any, dtype: torch.dtype, layers: Sequence[torch.nn.Module], step: Step) -> Memory:
    """The peak of one training step. layers: the decoder's layers (on the meta device)."""
    trace = partial(
        traced_step, dtype=dtype, method=step.method, lora=step.lora, lengths=step.lengths, targets=step.targets,
        device=step.device, checkpointing=step.checkpointing, kept=step.kept, general=step.general,
    )  # fmt: skip
    plain = not step.lora.layers_to_transform and not step.lora.rank_pattern
    if uniform(layers, config) and plain and len(layers) > 2 * MORE:
        few, more = (trace(with_layers(config, count)) for count in (FEW, MORE))
        peaks = {part: _continued(few[part], more[part], len(layers)) for part in more}
    else:
        peaks = trace(config)
    moment = max(peaks, key=lambda part: sum(peaks[part].values()))
    return _named(peaks[moment], moment)


def _continued(few: Bytes, more: Bytes, count: int) -> Bytes:
    """bytes(count) = bytes(MORE) + (count - MORE) · (bytes(MORE) - bytes(FEW)) / (MORE - FEW), part by part."""
    step = MORE - FEW
    return {
        part: max(more.get(part, 0) + (count - MORE) * (more.get(part, 0) - few.get(part, 0)) // step, 0)
        for part in {*few, *more}
    }


def _named(at: Bytes, moment: str) -> Memory:
    names = {"weights", "masters", "gradients", "optimiser", "kept", "origin", "forward", "loss", SLACK}

    def get(part: str) -> int:
        return at.get(part, 0)

    return Memory(
        weights=get("weights"),
        masters=get("masters"),
        gradients=get("gradients"),
        optimiser=get("optimiser"),
        kept=get("kept"),
        origin=get("origin"),
        activations=get("forward"),
        loss=get("loss"),
        working=sum(size for part, size in at.items() if part not in names),
        slack=get(SLACK),
        moment=moment,
    )
