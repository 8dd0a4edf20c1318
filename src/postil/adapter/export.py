"""Export: base and adapter written as one plain model directory, from a dense base or beside a 4-bit one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from postil.adapter.adapter import Adapter
from postil.adapter.attach import attach, check_base, detach
from postil.adapter.merge import (
    BOUNDS,
    Drift,
    check_idle,
    checked_weights,
    logits_of,
    merged_tensors,
    probe_ids_of,
    put_in,
    unmerge,
)
from postil.adapter.model import AdaptedModel
from postil.base import Base, freeze, load_base
from postil.base.quiet import quiet
from postil.base.stored import read_config
from postil.errors import AdapterError, StorageError, listed
from postil.files import atomic_directory, check_vacant, write_json

INTO = 'into="original" (--into original) or into="dequantised" (--into dequantised)'
DEQUANTISED = 'into="dequantised" (--into dequantised)'


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
        check_idle(model)
        weights = checked_weights(model, names)
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
        ids, (before, model.active), dense.active = probe_ids_of(base), (model.active, weights), weights
        try:
            drift = Drift.between(logits_of(model, ids), logits_of(dense, ids))
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
    drift = put_in(model, weights, tensors, probe_ids_of(model.base))
    unmerge(model)
    return drift


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
    """Floating tensors in `dtype`; names that share all of a tensor still share it."""
    done: dict[tuple[object, ...], torch.Tensor] = {}
    out = {}
    for key, value in state.items():
        if value.is_floating_point():
            whole = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if whole not in done:
                done[whole] = value.to(dtype)
            value = done[whole]
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
