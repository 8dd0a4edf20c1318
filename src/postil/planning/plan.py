"""plan: what training a base takes in memory and on disk, from its configuration alone, and where it fits."""

from __future__ import annotations

import json
import os
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from postil.adapter.config import LoraConfig
from postil.errors import RecipeError, nearest
from postil.planning.memory import Memory
from postil.planning.shapes import Shape, open_shape
from postil.settings import Settings

USABLE = 0.92  # of a card's nominal memory: the rest goes to the driver's context, ECC and fragmentation
GIB = 2**30
DTYPES = ("float32", "bfloat16", "float16")
METHODS = ("lora", "qlora", "full")


class PlanOptions(Settings):
    """What to plan for. Unknown keys and impossible values raise RecipeError.

    pack_tokens: tokens of the largest flat batch (at most the recipe's training.pack_tokens); sequence_tokens: of
    one sequence in it; lengths: the tokens of every sequence of that batch, in place of both. target_share: of its
    tokens with loss. dtype: of the base, "auto" as stored. device: "cuda" or "cpu". held_out: whether rows are held
    out, so that a copy of the best state is kept. guard: whether general text is watched or held to, for which full
    fine-tuning keeps a copy of the base. copies: of customised models, for the storage.
    """

    where: ClassVar[str] = "plan"

    method: Literal["lora", "qlora", "full"] = "lora"
    lora: LoraConfig = Field(default_factory=lambda: LoraConfig.parse({}))
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["cuda", "cpu"] = "cuda"
    pack_tokens: int = Field(default=4096, ge=1)
    sequence_tokens: int = Field(default=512, ge=1)
    lengths: tuple[int, ...] | None = None
    target_share: float = Field(default=1.0, gt=0, le=1)
    gradient_checkpointing: bool = False
    held_out: bool = True
    guard: bool = False
    copies: int = Field(default=50, ge=1)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Tokens per sequence of the largest flat batch."""
        if self.lengths is not None:
            return self.lengths
        whole, rest = divmod(self.pack_tokens, min(self.sequence_tokens, self.pack_tokens))
        return (*[min(self.sequence_tokens, self.pack_tokens)] * whole, *([rest] if rest else []))


class Counted(Settings):
    """Numbers of numbers: the base's parameters, those that are trained, the adapted modules and their largest.

    largest: (path, d_out, d_in, adapter parameters beside it), None for full fine-tuning.
    """

    where: ClassVar[str] = "plan"

    parameters: int
    trained: int
    modules: int = 0
    largest: tuple[str, int, int, int] | None = None


class Storage(Settings):
    """Bytes on disk: the base, one adapter (None for full), a checkpoint; `copies` customised models, each whole, and
    as one base with adapters (shared, None for full)."""

    where: ClassVar[str] = "plan"

    base: int
    adapter: int | None
    checkpoint: int
    copies: int
    whole: int
    shared: int | None


class Card(Settings):
    """A graphics card (or this machine) of `gib` GiB, and whether the step fits; `why`: in words."""

    where: ClassVar[str] = "plan"

    name: str
    gib: float
    fits: bool
    why: str


class Plan(Settings):
    """What a training run takes. memory: at the peak of a step; checkpointed: the same with gradient checkpointing.

    undivided_logits: the bytes that float32 logits of all targets would take, which are never held.
    """

    where: ClassVar[str] = "plan"

    base: str
    architecture: str
    dtype: str
    options: PlanOptions
    counted: Counted
    memory: Memory
    checkpointed: Memory | None
    undivided_logits: int
    storage: Storage
    cards: list[Card]
    notes: list[str]


def plan(base: str | Path, options: PlanOptions | None = None, **settings: Any) -> Plan:
    """Plan a training run of `base`: memory, storage, and the cards that it fits on; no weight is read.

    base: a model directory or config.json, a known base, or a well-known size ("7B", "70B"). settings: fields of
    PlanOptions, with those of LoraConfig (r, target_modules, …) beside. Raises BaseModelError, AdapterError,
    RecipeError.
    """
    import torch

    from postil.base.structure import decoder_layers
    from postil.planning.memory import Step, peak_of
    from postil.planning.notes import notes_of
    from postil.planning.step import meta_model

    options = options or _options(settings)
    shape = open_shape(base)
    name = shape.dtype if options.dtype == "auto" else options.dtype
    if name not in DTYPES:
        raise RecipeError(f"{base} is stored in {name}{nearest(name, DTYPES)}; say which with --dtype bfloat16")
    dtype: torch.dtype = getattr(torch, name)
    options, said = _fitting(shape, options)
    model = meta_model(shape.config, dtype)
    layers = list(decoder_layers(model)[1])
    counted = _counted(model, options)
    lengths = options.sequences
    targets = max(round(options.target_share * sum(lengths)), 1)

    def peak(checkpointing: bool) -> Memory:
        step = Step(
            options.method, options.lora, lengths, targets, options.device, checkpointing, options.held_out,
            options.guard,
        )  # fmt: skip
        return peak_of(shape.config, dtype, layers, step)

    memory = peak(options.gradient_checkpointing)
    checkpointed = None if options.gradient_checkpointing else peak(True)
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    stored = memory.weights if shape.nf4 else counted.parameters * dtype.itemsize
    storage = _storage(counted, stored, options)
    places = _known_cards() if options.device == "cuda" else _this_machine()
    cards = [_fitted(place, gib, memory, checkpointed) for place, gib in places]
    return Plan(
        base=str(base), architecture=str(shape.config.model_type), dtype=name, options=options, counted=counted,
        memory=memory, checkpointed=checkpointed, undivided_logits=4 * targets * vocabulary, storage=storage,
        cards=cards, notes=[*said, *notes_of(shape, counted, memory, options, dtype)],
    )  # fmt: skip


def _options(settings: dict[str, Any]) -> PlanOptions:
    """Fields of PlanOptions, those of LoraConfig beside them."""
    inner = {key: settings.pop(key) for key in list(settings) if key in LoraConfig.model_fields}
    if inner:
        settings["lora"] = LoraConfig(**inner)
    return PlanOptions(**settings)


def _counted(model: Any, options: PlanOptions) -> Counted:
    """The base's and the adapter's numbers, by attaching to the model on the meta device."""
    from postil.adapter import AdaptedModel
    from postil.base import Base

    parameters = sum(parameter.numel() for parameter in model.parameters())
    if options.method == "full":
        return Counted(parameters=parameters, trained=parameters)
    resident = AdaptedModel(Base(model, None, "plan")).add("plan", options.lora)
    largest = max(resident.targets, key=lambda target: target.d_in * target.d_out)
    beside = largest.rank * (largest.d_in + largest.d_out)
    return Counted(
        parameters=parameters,
        trained=resident.parameters,
        modules=len(resident.targets),
        largest=(largest.path, largest.d_out, largest.d_in, beside),
    )


def _fitting(shape: Shape, options: PlanOptions) -> tuple[PlanOptions, list[str]]:
    """The options as this base allows them, and what was changed in them. Raises RecipeError."""
    changes, said = dict[str, Any](), list[str]()
    if shape.nf4 and options.method == "full":
        raise RecipeError("training.method full changes every weight, and 4-bit weights cannot be: take a dense base")
    if shape.nf4 and options.method == "lora":
        changes["method"] = "qlora"
        said.append(f"{shape.name} is stored in 4 bits, so what trains beside it is planned as qlora")
    context = getattr(shape.config.get_text_config(), "max_position_embeddings", None)
    if options.lengths is None and context and context < min(options.sequence_tokens, options.pack_tokens):
        changes["sequence_tokens"] = context
        said.append(f"sequences of {context} tokens, the base's context")
    return options.model_copy(update=changes), said


def _storage(counted: Counted, base: int, options: PlanOptions) -> Storage:
    adapter = None if options.method == "full" else 4 * counted.trained  # float32, as save_adapter writes it
    return Storage(
        base=base,
        adapter=adapter,
        checkpoint=4 * counted.trained * (4 if options.held_out else 3),  # masters, two moments, the best state
        copies=options.copies,
        whole=options.copies * base,
        shared=None if adapter is None else base + options.copies * adapter,
    )


def _known_cards() -> list[tuple[str, float]]:
    text = resources.files("postil.planning").joinpath("cards.json").read_text(encoding="utf-8")
    return [(entry["name"], float(entry["gib"])) for entry in json.loads(text)]


def _this_machine() -> list[tuple[str, float]]:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return []
    return [("this machine", round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1))]


def _fitted(name: str, gib: float, memory: Memory, checkpointed: Memory | None) -> Card:
    room = gib * GIB * USABLE
    if memory.total <= room:
        return Card(name=name, gib=gib, fits=True, why=f"{(room - memory.total) / GIB:.1f} GiB to spare")
    if memory.weights > room:
        why = f"the weights alone take {memory.weights / GIB:.1f} GiB: only by streaming"
    elif checkpointed is not None and checkpointed.total <= room:
        why = "fits with gradient checkpointing"
    else:
        why = f"{(memory.total - room) / GIB:.1f} GiB short"
    return Card(name=name, gib=gib, fits=False, why=why)
