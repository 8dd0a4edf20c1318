"""Holding an adapter to its base: the gradient of KL(base||adapted) over general rows, the base's part kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from postil.adapter.bank import Resident
from postil.adapter.divergence import Bare, base_states, kl_to_base
from postil.adapter.model import AdaptedModel
from postil.data import Sample, epoch_steps, pack
from postil.kernels.layout import Layout
from postil.seeds import derive
from postil.training.batch import shares, to_device, training_spans
from postil.training.optimizer import Trainable
from postil.training.options import Settled, TrainOptions

KEPT_BYTES = 256 << 20  # of the base's hidden states
CHUNK = 16  # rows that the base is run over together, at most
PACK_TOKENS: int = TrainOptions.model_fields["pack_tokens"].default


@dataclass(slots=True)
class BaseStates:
    """The bare base's hidden states [targets, dim] before each target of a general row, computed once where there is
    room.

    rows: those that will be asked for. The first of them, as many as `room` bytes hold, are kept, and up to CHUNK
    neighbours (of pack_tokens tokens in all) computed together; all others are run alone, each time they are asked
    for. Which are is known beforehand, so the bits of one do not depend on which were asked for before.
    """

    bare: Bare
    rows: Sequence[Sample] = ()
    pack_tokens: int = PACK_TOKENS
    room: int = KEPT_BYTES
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    chunks: dict[int, tuple[Sequence[Sample], int]] = field(init=False)  # and the targets up to its end

    def __post_init__(self) -> None:
        self.chunks, targets = {}, 0
        for chunk in _chunks(self.rows, self.pack_tokens):
            targets += sum(row.target_tokens for row in chunk)
            self.chunks |= {id(row): (chunk, targets) for row in chunk}

    @torch.no_grad()
    def of(self, model: AdaptedModel, row: Sample) -> torch.Tensor:
        """Those of one row, in the base's dtype."""
        if id(row) in self.kept:
            return self.kept[id(row)]
        width = model.model.config.get_text_config().hidden_size * model.base.dtype.itemsize
        chunk, targets = self.chunks.get(id(row), ((row,), 0))
        keeps = 0 < targets * width <= self.room
        chunk = chunk if keeps else (row,)
        packed = pack(chunk)
        ids, positions, share = to_device(packed, model)
        before = share.nonzero(as_tuple=True)[0] - 1
        with model.using(Layout.packed(packed.lengths)):
            states = base_states(model, ids, positions, before, bare=self.bare)
        parts = dict(zip(map(id, chunk), torch.split(states, [one.target_tokens for one in chunk]), strict=True))
        if keeps:
            self.kept |= parts
        return parts[id(row)]


def _chunks(rows: Sequence[Sample], pack_tokens: int) -> list[list[Sample]]:
    """Neighbours, up to CHUNK of them and, of several, pack_tokens tokens."""
    found, tokens = list[list[Sample]](), 0
    for row in rows:
        if not found or len(found[-1]) == CHUNK or tokens + len(row.ids) > pack_tokens:
            found.append([])
            tokens = 0
        found[-1].append(row)
        tokens += len(row.ids)
    return found


def kl_gradients(
    model: AdaptedModel,
    weights: Trainable,
    resident: Resident | None,
    kinds: Mapping[str, Sequence[Sample]],
    options: Settled,
    step: int,
    states: BaseStates,
    scale: float = 1.0,
) -> dict[str, float]:
    """Add the gradient of kl_weight · mean KL(base||adapted) over the target tokens of the rows of all kinds; returns
    the mean of each kind (nats per token).

    Divided by its own tokens, whatever the target's rows are, and split into packs as they are; the backward pass is
    the sum's (times `scale`), as the target's is. It costs a training pass over these rows, and a forward pass of the
    base over those it has not seen.
    """
    rows = [row for found in kinds.values() for row in found]
    kind_of = [kind for kind, found in kinds.items() for _ in found]
    numbered = [replace(row, row=number) for number, row in enumerate(rows)]
    (packs,) = epoch_steps(
        numbered, batch_size=len(rows), accumulation=options.accumulation, pack_tokens=options.pack_tokens,
        seed=0, epoch=0, shuffle=False, share=shares(model, resident),
    )  # fmt: skip
    sums = dict.fromkeys(kinds, 0.0)
    tokens = {kind: sum(row.target_tokens for row in found) for kind, found in kinds.items()}
    divisor = sum(tokens.values()) * scale / options.kl_weight
    weights.grad.mul_(divisor)  # what is there already: one buffer, so that a whole model needs no second
    seed = derive(options.seed, "dropout", step, "general")
    for packed in packs:
        order = [number for number, _ in packed.sizes]  # the rows as their targets follow each other
        base = torch.cat([states.of(model, rows[number]) for number in order])
        ids, positions, share = to_device(packed, model)
        before = share.nonzero(as_tuple=True)[0] - 1
        with model.using(Layout.packed(packed.lengths, training_spans(resident, packed, seed), packed.before)):
            total, apart = kl_to_base(model, ids, positions, before, bare=states.bare, base=base)
            if total.requires_grad:
                (total * scale).backward()  # type: ignore[no-untyped-call]
        weights.collect()
        parts = torch.split(apart.detach().double(), [rows[number].target_tokens for number in order])
        for number, part in zip(order, parts, strict=True):
            sums[kind_of[number]] += float(part.sum())
    weights.grad.div_(divisor)
    return {kind: sums[kind] / tokens[kind] for kind in kinds}
