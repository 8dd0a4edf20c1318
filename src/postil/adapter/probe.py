"""The probe at attaching: does this architecture run packed, one sequence at a time, or not rightly at all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from postil.adapter.model import AdaptedModel
from postil.errors import BaseModelError
from postil.kernels.layout import Layout, positions_of

LENGTHS = (3, 1, 4)
WINDOW = 3  # tokens that a layer sees in the second probe
WINDOW_LENGTHS = (10, 2, 5)
REST = 2  # tokens of one more sequence, whose beginning is the first one
WINDOW_FIELDS = ("sliding_window", "attention_chunk_size")
# The largest difference of a logit allowed, in standard deviations of all logits. SmolLM2-135M-Instruct on two
# cores: up to 5e-5 in float32, 0.02 in float16, 0.19 in bfloat16.
BOUNDS = {torch.float32: 1e-3, torch.float16: 0.1}
COARSE = 0.5  # bfloat16 and what else there is


@torch.no_grad()
def probe(model: AdaptedModel) -> None:
    """Set `model.packs`: True where a pack's logits equal each sequence's alone, one that shares its beginning with
    another among them, else False, which is one sequence at a time through transformers' own attention.

    A window longer than a cheap probe is shrunk for a second look: a model may keep it in its attention mask
    alone, which a pack does not have. Raises BaseModelError where neither way is right.
    """
    for model.packs in (True, False):
        difference = _difference(model, LENGTHS, _alone(model, LENGTHS))
        if _small(difference, model) and _windows_hold(model):
            return
    raise BaseModelError(
        f"{type(model.model).__name__} gives other logits through postil than by itself (by {difference:.2g} of "
        "their spread, or more beyond a sliding window); this architecture is not supported"
    )


def _small(difference: float, model: AdaptedModel) -> bool:
    return difference <= BOUNDS.get(model.base.dtype, COARSE)  # False for NaN


def _windows_hold(model: AdaptedModel) -> bool:
    """Whether sequences beyond the window of the layers that have one are right too.

    The bound of 16 bits is coarse, so the difference must also be small beside what the window changes.
    """
    if not _windowed(model.model):
        return True
    with _windows_at(model.model, sum(WINDOW_LENGTHS)):
        whole = _alone(model, WINDOW_LENGTHS)
    with _windows_at(model.model, WINDOW):
        cut = _alone(model, WINDOW_LENGTHS)
        effect = _apart(whole, cut)
        if effect == 0:  # no layer slides
            return True
        difference = _difference(model, WINDOW_LENGTHS, cut)
    return _small(difference, model) and difference <= effect / 2


def _ids(model: AdaptedModel, lengths: Sequence[int]) -> torch.Tensor:
    rows = int(model.model.get_input_embeddings().weight.shape[0])
    return (torch.arange(sum(lengths), device=model.base.device) * 7 + 3) % min(rows, 997)


def _alone(model: AdaptedModel, lengths: Sequence[int]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of each sequence, and of the rest, by the transformers model itself."""
    *parts, rest = torch.split(_ids(model, (*lengths, REST)), [*lengths, REST])
    parts.append(torch.cat([parts[0], rest]))
    found = [model.model(input_ids=part[None], use_cache=False).logits[0].float() for part in parts]
    return torch.cat([*found[:-1], found[-1][-REST:]])


def _difference(model: AdaptedModel, lengths: Sequence[int], wanted: torch.Tensor) -> float:
    """How far postil's way is from `wanted`; infinitely where the model's code does not take it."""
    parts, device = (*lengths, REST), model.base.device
    layout, model.attention_calls = Layout.packed(parts, before=[*[None] * len(lengths), 0]), Counter()
    positions = positions_of(parts, device)
    positions[-REST:] += lengths[0]
    try:
        with model.using(layout):
            hidden = model.hidden(_ids(model, parts), positions)
            found = model.logits(hidden, layout.spans).float()
    except (
        TypeError,
        KeyError,
        ValueError,
    ) as error:  # no positions taken, another attention call, a mask of its own
        if not model.packs:
            raise BaseModelError(
                f"{type(model.model).__name__} does not run as a decoder through postil ({error}); this architecture "
                "is not supported"
            ) from error
        return math.inf
    if model.packs and set(model.attention_calls.values()) != {1}:  # none, or twice a layer: one place for its keys
        return math.inf
    return _apart(found, wanted)


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference of a logit, in standard deviations of the logits."""
    return float((found - wanted).abs().max()) / (float(wanted.std()) or 1.0)


def _places(model: PreTrainedModel) -> list[Any]:
    """Every configuration and module that may keep a window."""
    config = model.config
    inner = [module.__dict__.get("config") for module in model.modules()]
    configs = {id(c): c for c in (config, config.get_text_config(), *inner) if c is not None}
    return [*configs.values(), *model.modules()]


def _windowed(model: PreTrainedModel) -> bool:
    return any(_window(place, field) for place in _places(model) for field in WINDOW_FIELDS)


def _window(place: Any, field: str) -> int | None:
    """The window that a configuration or module keeps; None for none (also written as 0 or -1)."""
    value = getattr(place, field, None)
    return value if type(value) is int and value > 0 else None


@contextmanager
def _windows_at(model: PreTrainedModel, size: int) -> Iterator[None]:
    """Every window at `size` tokens, a difference of one to the configuration's kept (a module's own counting)."""
    places = _places(model)
    before = [
        (place, field, value)
        for field in WINDOW_FIELDS
        for place in places
        if (value := _window(place, field)) is not None
    ]
    first = {field: value for _, field, value in reversed(before)}  # the configuration's
    try:
        for place, field, value in before:
            apart = value - first[field]
            setattr(place, field, size + (apart if abs(apart) == 1 else 0))
        yield
    finally:
        for place, field, value in before:
            setattr(place, field, value)
