"""Merging: W + s·B·A written into the base's modules and taken out again exactly, or exported as a plain model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from postil.adapter.adapter import Adapter
from postil.adapter.attach import attach, check_base, detach
from postil.adapter.bank import Resident
from postil.adapter.model import AdaptedModel
from postil.base import Base, freeze, load_base
from postil.base.quiet import quiet
from postil.base.stored import read_config
from postil.errors import AdapterError, StorageError, listed
from postil.files import atomic_directory, check_vacant, write_json

# The largest difference of a logit that rounding W + s·B·A to the base's dtype may make, by that dtype.
# SmolLM2-135M with all linear layers adapted, random B: up to 8e-5 in float32, 1.2 in bfloat16, 0.10 in float16.
BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 2.0, torch.float16: 0.25}
PROBE = "The margin of an old book often holds more than its text: a date, a doubt, 3 + 4 = 7, and a name."
PROBE_TOKENS = 32
INTO = 'into="original" (--into original) or into="dequantised" (--into dequantised)'
DEQUANTISED = 'into="dequantised" (--into dequantised)'


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


@dataclass(frozen=True, slots=True)
class Exported:
    """A model directory that was written, and how far its logits are from the adapted model's.

    drift: by writing W + s·B·A in the dtype of the files; from_nf4: from those of the adapter on its 4-bit base,
    where it was exported from one.
    """

    path: Path
    drift: Drift
    from_nf4: Drift | None = None


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
    _idle(model)
    weights = _weights(model, names)
    model.base.fingerprint()  # while the base is bare: what is exported while merged still belongs to it
    ids = _probe_ids(model.base) if probe_ids is None else probe_ids.reshape(1, -1).to(model.base.device)
    limit = BOUNDS.get(model.base.dtype, BOUNDS[torch.bfloat16]) if bound is None else bound
    drift = _put_in(model, weights, merged_tensors(model, weights), ids)
    if not drift.max_logit <= limit:
        unmerge(model)
        raise AdapterError(
            f"merging {listed(weights)} moves a logit by {drift.max_logit:.3g} (mean {drift.mean_logit:.3g}, on "
            f"{drift.tokens} tokens), above the bound of {limit:g}; it was undone: load the base in a wider dtype, "
            "or allow more with a higher bound (--bound)"
        )
    return drift


def _put_in(
    model: AdaptedModel, weights: dict[str, float], tensors: Mapping[str, torch.Tensor], ids: torch.Tensor
) -> Drift:
    """Make `tensors` the base's parameters in its own dtypes, for `unmerge` to undo, and measure the drift from
    the adapted model; undone on any error."""
    before = model.active
    model.active = weights
    try:
        wanted = _logits(model, ids)
        for key, tensor in tensors.items():
            path, _, name = key.rpartition(".")
            module = model.model.get_submodule(path)
            original = module._parameters[name]
            assert original is not None
            new = nn.Parameter(tensor.to(original.dtype), requires_grad=False)
            module._parameters[name] = new
            model.merged[key] = (original, new)
        model.active, model.active_before_merge = {}, before
        drift = Drift.between(wanted, _logits(model, ids))
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
def export_merged(
    target: AdaptedModel | Base | PreTrainedModel,
    adapter: str | Mapping[str, float] | Adapter,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    bound: float | None = None,
    into: str | None = None,
) -> Exported:
    """Write base and adapter as one plain model directory, which transformers loads without postil.

    target, adapter: an AdaptedModel with the name (or {name: weight}) of its residents; or an Adapter and what it
    belongs on. dtype: of the written weights (default: each weight's own); W + s·B·A is computed in float32 and
    rounded once. A head that no longer equals the embedding is written apart, `tie_word_embeddings` false. The
    model in memory is not changed. bound: on the largest difference of a logit that rounding may make, measured as
    in `merge`, in the base's dtype; by default `merge`'s for the coarser of the two dtypes. Raises AdapterError
    where the drift is above it, StorageError where `directory` is in use or cannot be written; then nothing is left.

    into: for a 4-bit base, and only there, what the adapter is merged into: "original", the 16-bit weights that it
    was quantised from (read again from their directory), or "dequantised", a dense copy of the 4-bit weights.
    Neither is quantised again; how far the result is from the adapter on the 4-bit base is in `from_nf4`.
    """
    check_vacant(directory)
    if bound is not None and not bound >= 0:
        raise AdapterError(f"the bound on a logit's difference is {bound:g}; give a number from 0")
    with _resident(target, adapter) as (model, names):
        _idle(model)
        weights = _weights(model, names)
        if model.base.quantised:
            return _export_from_nf4(model, weights, Path(directory), dtype, bound, into)
        if into is not None:
            raise AdapterError(f"into={into!r} is for a 4-bit base; {model.base.source} is dense, leave it out")
        merged = merged_tensors(model, weights)
        drift = _export_drift(model, weights, merged, dtype)
        limit = bound
        if limit is None:
            limit = max(BOUNDS.get(d, BOUNDS[torch.bfloat16]) for d in (model.base.dtype, dtype or model.base.dtype))
        if not drift.max_logit <= limit:
            raise AdapterError(
                f"exporting {listed(weights)} moves a logit by {drift.max_logit:.3g} (mean {drift.mean_logit:.3g}, "
                f"on {drift.tokens} tokens), above the bound of {limit:g}; nothing was written: load the base in a "
                "wider dtype, or allow more with a higher bound (--bound)"
            )
        state = {key: value for key, value in model.model.state_dict().items() if key not in merged}
        for key, tensor in merged.items():
            state[key] = tensor.to(dtype or model.model.get_parameter(key).dtype)
        if dtype is not None:
            state = _cast(state, dtype)
        _write(model, state, Path(directory), dtype, untied=_unties(model.model, set(merged)))
    return Exported(Path(directory), drift)


def _export_from_nf4(
    model: AdaptedModel,
    weights: dict[str, float],
    directory: Path,
    dtype: torch.dtype | None,
    bound: float | None,
    into: str | None,
) -> Exported:
    """Export onto the dense base that the user named, and measure the way from the 4-bit one."""
    if into == "original":
        base = _original(model.base)
    elif into == "dequantised":
        base = _dequantised(model.base)
    else:
        given = "" if into is None else f", not {into!r}"
        choice = INTO if _dense_somewhere(model.base) else f"{DEQUANTISED}, since its files are in 4 bits too"
        raise AdapterError(
            f"the adapter lies on a base in 4 bits, as it was trained: say what to merge into, with {choice}{given}"
        )
    dense = attach(base)
    try:
        for name in weights:
            attach(dense, model.export(name), name=name)
        dense.active = {}
        exported = export_merged(dense, weights, directory, dtype=dtype, bound=bound)
        ids, (before, model.active), dense.active = _probe_ids(base), (model.active, weights), weights
        try:
            drift = Drift.between(_logits(model, ids), _logits(dense, ids))
        finally:
            model.active = before
    finally:
        detach(dense)
    return replace(exported, from_nf4=drift)


def _dense_somewhere(base: Base) -> bool:
    """Whether the files that a 4-bit base was read from hold it dense."""
    if base.directory is None:
        return base.file is not None
    return not read_config(base.directory).get("quantization_config")


def _original(base: Base) -> Base:
    """The dense base that a 4-bit one was quantised from while loading, in the same dtype."""
    place = base.file or base.directory
    mend = "give the 16-bit directory as the base, or merge into dequantised"
    if place is None or not base.as_stored:
        raise AdapterError(
            f"where {base.source} came from is not known, so its 16-bit weights cannot be read; {mend}"
        )
    found = load_base(
        place,
        dtype=str(base.dtype).removeprefix("torch."),
        device=str(base.device),
        trust_remote_code=not type(base.model).__module__.startswith("transformers."),  # it has run here already
    )
    if found.quantised:
        raise AdapterError(f"{base.source} holds 4-bit weights, the original is not there; {mend}")
    return found


def _dequantised(base: Base) -> Base:
    """A dense copy of a 4-bit base, of the same source."""
    from postil.base.quantise import dequantised

    model = dequantised(base.model)
    freeze(model)
    source = base.fingerprint().source
    return Base(model, base.tokenizer, base.source, base.directory, base.file, base.as_stored, _source_hash=source)


def _export_drift(
    model: AdaptedModel, weights: dict[str, float], merged: Mapping[str, torch.Tensor], dtype: torch.dtype | None
) -> Drift:
    """The drift of what will be written: merged tensors and, in another dtype, every parameter rounded to it."""
    tensors = dict(merged)
    if dtype is not None:
        for key, parameter in model.model.named_parameters(remove_duplicate=False):
            tensors[key] = tensors.get(key, parameter).to(dtype)
    drift = _put_in(model, weights, tensors, _probe_ids(model.base))
    unmerge(model)
    return drift


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
            out |= {f"{path}.{key}": value.float().clone() for key, value in parameters.items()}
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


def _idle(model: AdaptedModel) -> None:
    if model.merged:
        raise AdapterError("an adapter is merged into the base already; unmerge it first")
    if model.layout is not None:
        raise AdapterError("the model is running; merge afterwards")


def _weights(model: AdaptedModel, names: str | Mapping[str, float]) -> dict[str, float]:
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


def _probe_ids(base: Base) -> torch.Tensor:
    if base.tokenizer is not None:
        ids = list(base.tokenizer(PROBE)["input_ids"])
    else:
        rows = int(base.model.get_input_embeddings().weight.shape[0])
        ids = [(n * 7 + 3) % min(rows, 997) for n in range(PROBE_TOKENS)]
    return torch.tensor([ids[: base.context or len(ids)]], device=base.device)


def _logits(model: AdaptedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.model(input_ids=ids, use_cache=False).logits
    return logits[0].float()


@contextmanager
def _resident(
    target: AdaptedModel | Base | PreTrainedModel, adapter: str | Mapping[str, float] | Adapter
) -> Iterator[tuple[AdaptedModel, str | Mapping[str, float]]]:
    """The AdaptedModel and the names meant; what was attached for it is taken off again."""
    if isinstance(target, AdaptedModel):
        if not isinstance(adapter, Adapter):
            yield target, adapter
            return
        check_base(adapter, target.base)
        name = "export"
        while name in target.residents:
            name += "-1"
        target.add(name, adapter)
        try:
            yield target, name
        finally:
            target.remove(name)
        return
    if not isinstance(adapter, Adapter):
        raise AdapterError("a base alone has no adapter by name; give an Adapter, or the AdaptedModel it is on")
    model = attach(target, adapter, name="export")
    try:
        yield model, "export"
    finally:
        detach(model)


def _unties(model: PreTrainedModel, changed: set[str]) -> bool:
    """Whether the changed parameters leave tied names with different values."""
    own = dict(model.named_parameters(remove_duplicate=False))
    twins = {key for key in changed for other in own if other != key and own[other] is own[key]}
    return bool(twins)


def _cast(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floating tensors in `dtype`; names that share a tensor still share it."""
    done: dict[int, torch.Tensor] = {}
    out = {}
    for key, value in state.items():
        if value.is_floating_point():
            value = done.setdefault(value.data_ptr(), value.to(dtype))
        out[key] = value
    return out


def _write(
    model: AdaptedModel, state: dict[str, torch.Tensor], directory: Path, dtype: torch.dtype | None, *, untied: bool
) -> None:
    config, text = model.model.config, model.model.config.get_text_config()
    before = [(c, getattr(c, "tie_word_embeddings", None), c.dtype, c.architectures) for c in (config, text)]
    try:
        if untied:
            config.tie_word_embeddings = text.tie_word_embeddings = False
        with atomic_directory(directory) as temporary, quiet():
            model.model.save_pretrained(temporary, state_dict=state)
            if model.base.tokenizer is not None:
                model.base.tokenizer.save_pretrained(temporary)
            if dtype is not None:
                written = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
                write_json(temporary / "config.json", written | {"dtype": str(dtype).removeprefix("torch.")})
            for file in temporary.rglob("*"):
                file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes for the owner alone
    except SafetensorError as error:
        raise StorageError(
            f"{directory} could not be written ({error}); nothing half-written was left. "
            "Free some space or choose another directory, and run it again."
        ) from error
    finally:
        for c, tied, kind, architectures in before:
            if untied and tied is not None:
                c.tie_word_embeddings = tied
            c.dtype, c.architectures = kind, architectures
