"""Merging: W + s·B·A written into the base's modules, its drift measured, and taken out again exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from postil.adapter.bank import Resident
from postil.adapter.linear import between
from postil.adapter.model import AdaptedModel
from postil.base import Base
from postil.errors import AdapterError, listed

# The largest difference of a logit that rounding W + s·B·A to the base's dtype may make, by that dtype.
# SmolLM2-135M with all linear layers adapted, random B: up to 8e-5 in float32, 1.2 in bfloat16, 0.10 in float16.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 2.0, torch.float16: 0.25}
PROBE = "The margin of an old book often holds more than its text: a date, a doubt, 3 + 4 = 7, and a name."
PROBE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Drift:
    """How far merging moved the logits on a probe: largest and mean absolute difference, over `tokens` tokens;
    beside them the largest logit there, and how many tokens kept their likeliest successor."""

    max_logit: float
    mean_logit: float
    tokens: int
    largest: float
    same_choice: int

    @classmethod
    def between(cls, before: torch.Tensor, after: torch.Tensor) -> Drift:
        """From the logits [tokens, vocabulary] before and after."""
        difference = (after - before).abs()
        same = int((before.argmax(-1) == after.argmax(-1)).sum())
        return cls(float(difference.max()), float(difference.mean()), len(before), float(before.abs().max()), same)

    def __str__(self) -> str:
        return (
            f"a logit moved by {self.max_logit:.3g} at most (mean {self.mean_logit:.3g}, logits up to "
            f"{self.largest:.3g}), the likeliest token is the same at {self.same_choice} of {self.tokens} places"
        )


@torch.no_grad()
def merge(
    model: AdaptedModel,
    names: str | Mapping[str, float],
    *,
    probe_ids: torch.Tensor | None = None,
    bound: float | None = None,
) -> Drift:
    """Write resident adapters into the base: one name, or a weighted combination {name: weight}.

    Every changed weight becomes a new frozen parameter, W + s·B·A computed in float32 and rounded once to W's
    dtype; the original parameters are kept aside for `unmerge`, and a tied head is untied by itself. Until then
    no adapter is active. probe_ids: int64 [tokens] or [1, tokens], the text that the drift is measured on
    (default: a fixed English line). bound: on the largest difference of a logit; by default 1e-3 for a float32
    base, 2.0 for bfloat16, 0.25 for float16. Raises AdapterError when the drift is above it; the base is then as
    before; and for a 4-bit base, which is never quantised again.
    """
    if model.base.quantised:
        raise AdapterError(
            "the base is held in 4 bits, and W + s·B·A is never quantised again: merge on the 16-bit base, or write "
            "a model with export_merged and its `into`"
        )
    check_idle(model)
    weights = checked_weights(model, names)
    model.base.fingerprint()  # while the base is bare: what is exported while merged still belongs to it
    ids = probe_ids_of(model.base) if probe_ids is None else probe_ids.reshape(1, -1).to(model.base.device)
    limit = BOUNDS.get(model.base.dtype, BOUNDS[torch.bfloat16]) if bound is None else bound
    drift = put_in(model, weights, merged_tensors(model, weights), ids)
    if not drift.max_logit <= limit:
        unmerge(model)
        raise AdapterError(
            f"merging {listed(weights)} moves a logit by {drift.max_logit:.3g} (mean {drift.mean_logit:.3g}, on "
            f"{drift.tokens} tokens), above the bound of {limit:g}; it was undone: load the base in a wider dtype, "
            "or allow more with a higher bound (--bound)"
        )
    return drift


def put_in(
    model: AdaptedModel, weights: dict[str, float], tensors: Mapping[str, torch.Tensor], ids: torch.Tensor
) -> Drift:
    """Make `tensors` the base's parameters in its own dtypes, for `unmerge` to undo, and measure the drift from
    the adapted model; undone on any error."""
    before = model.active
    model.active = weights
    try:
        wanted = logits_of(model, ids)
        for key, tensor in tensors.items():
            path, _, name = key.rpartition(".")
            module = model.model.get_submodule(path)
            original = module._parameters[name]
            assert original is not None
            new = nn.Parameter(tensor.to(original.dtype), requires_grad=False)
            module._parameters[name] = new
            model.merged[key] = (original, new)
        model.active, model.active_before_merge = {}, before
        drift = Drift.between(wanted, logits_of(model, ids))
    except BaseException:
        _put_back(model)
        model.active = before
        raise
    return drift


def unmerge(model: AdaptedModel) -> None:
    """Put the base's own parameters back, the very same objects; the adapters active before are active again.

    Raises AdapterError when nothing is merged.
    """
    if not model.merged:
        raise AdapterError("no adapter is merged into the base; there is nothing to unmerge")
    _put_back(model)
    model.active = {name: w for name, w in model.active_before_merge.items() if name in model.residents}
    model.active_before_merge = {}


@torch.no_grad()
def merged_tensors(model: AdaptedModel, weights: Mapping[str, float]) -> dict[str, torch.Tensor]:
    """Parameter path → its merged value in float32, for every parameter that these adapters change."""
    out: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        for key, change in _changes(model, model.resident(name)):
            if key not in out:
                out[key] = model.model.get_parameter(key).float().clone()
            out[key] += weight * change
        for path, parameters in model.resident(name).saved.items():
            for key, value in parameters.items():
                own = model.model.get_parameter(f"{path}.{key}")
                out[f"{path}.{key}"] = between(own, value, weight).float().clone()
    return out


def _changes(model: AdaptedModel, resident: Resident) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameter path → s·B·A in the parameter's own orientation, and the shift of each adapted bias."""
    keys = resident.keys
    for target in resident.targets:
        path = target.path
        if target.kind == "embedding":
            a, b = keys[f"{path}.lora_embedding_A"], keys[f"{path}.lora_embedding_B"]
        else:
            a, b = keys[f"{path}.lora_A.weight"], keys[f"{path}.lora_B.weight"]
        change = target.scale * (b @ a)  # [d_out, d_in]
        yield f"{path}.weight", change if target.kind == "linear" else change.T
        if f"{path}.bias" in keys and path not in resident.saved:
            yield f"{path}.bias", keys[f"{path}.bias"] - model.model.get_parameter(f"{path}.bias").float()


def check_idle(model: AdaptedModel) -> None:
    """Raise AdapterError where something is merged already, or the model runs."""
    if model.merged:
        raise AdapterError("an adapter is merged into the base already; unmerge it first")
    if model.layout is not None:
        raise AdapterError("the model is running; merge afterwards")


def checked_weights(model: AdaptedModel, names: str | Mapping[str, float]) -> dict[str, float]:
    """The adapters and weights meant, checked as `activate` checks them."""
    weights = {names: 1.0} if isinstance(names, str) else dict(names)
    model.check_combination(weights)
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights:
        raise AdapterError("no adapter to merge: give a name, or names with weights that are not all 0")
    return weights


def _put_back(model: AdaptedModel) -> None:
    for key, (original, _) in model.merged.items():
        path, _, name = key.rpartition(".")
        model.model.get_submodule(path)._parameters[name] = original
    model.merged.clear()


def probe_ids_of(base: Base) -> torch.Tensor:
    """int64 [1, tokens]: the fixed line that a drift is measured on."""
    if base.tokenizer is not None:
        ids = list(base.tokenizer(PROBE)["input_ids"])
    else:
        rows = int(base.model.get_input_embeddings().weight.shape[0])
        ids = [(n * 7 + 3) % min(rows, 997) for n in range(PROBE_TOKENS)]
    return torch.tensor([ids[: base.context or len(ids)]], device=base.device)


def logits_of(model: AdaptedModel, ids: torch.Tensor) -> torch.Tensor:
    """Float32 logits [tokens, vocabulary] of a plain call with the active adapters."""
    logits: torch.Tensor = model.model(input_ids=ids, use_cache=False).logits
    return logits[0].float()
