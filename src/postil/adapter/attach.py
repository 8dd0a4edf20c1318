"""attach and detach: stick adapters on a base, and take everything off again, the base bit for bit as it was."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from postil.adapter.adapter import Adapter
from postil.adapter.config import LoraConfig
from postil.adapter.model import AdaptedModel
from postil.base import Base, base_from_model
from postil.errors import AdapterError, BaseModelError
from postil.kernels.layout import Layout, positions_of

PROBE_LENGTHS = (3, 1, 4)


def attach(
    target: Base | PreTrainedModel | AdaptedModel,
    adapter: LoraConfig | Adapter | None = None,
    *,
    name: str = "default",
    seed: int = 0,
    force: bool = False,
) -> AdaptedModel:
    """Stick an adapter on a base: a fresh one from a LoraConfig, a loaded one, or none yet.

    target: a Base, a transformers model that the user has loaded (it is frozen), or an AdaptedModel, which
    gets one more resident. The adapter becomes active for plain forward calls. force: load an adapter whose
    fingerprint names another base. Raises AdapterError, BaseModelError.
    """
    if isinstance(target, AdaptedModel):
        model = target
    else:
        base = target if isinstance(target, Base) else base_from_model(target)
        if any("_postil_owner" in module.__dict__ for module in base.model.modules()):
            raise AdapterError("this base has adapters attached already; pass the AdaptedModel, or detach it first")
        model = AdaptedModel(base)
        try:
            _probe(model)
        except BaseException:
            model.take_off()
            raise
    if adapter is not None:
        try:
            if isinstance(adapter, Adapter) and not force:
                check_base(adapter, model.base)
            model.add(name, adapter, seed=seed)
        except BaseException:
            if target is not model:
                model.take_off()
            raise
        model.activate(name)
    return model


def detach(model: AdaptedModel) -> Base:
    """Take every adapter off; returns the base, bit for bit as before `attach`."""
    if model.merged:
        raise AdapterError("an adapter is merged into the base; unmerge it before detaching")
    if model.layout is not None:
        raise AdapterError("the model is running; detach it afterwards")
    model.take_off()
    return model.base


def check_base(adapter: Adapter, base: Base) -> None:
    """Raise AdapterError when the adapter names another base than this one, both named in the message."""
    wanted = adapter.base.get("source")
    if wanted is None:
        return
    here = base.fingerprint()
    if wanted != here.source:
        raise AdapterError(
            f"the adapter belongs to another base: it was made for {adapter.base_name or 'a base'} ({wanted[:23]}…), "
            f"this is {base.source} ({here.source[:23]}…); load that base, or pass force=True (generate, chat and "
            "merge: --force) if you know better"
        )


@torch.no_grad()
def _probe(model: AdaptedModel) -> None:
    """Decide how this architecture runs: packed where a pack's logits equal each sequence's alone, else one
    sequence at a time through transformers' own attention. Raises BaseModelError where neither is right."""
    device, vocabulary = model.base.device, model.model.get_input_embeddings().weight.shape[0]
    total = sum(PROBE_LENGTHS)
    ids = (torch.arange(total, device=device) * 7 + 3) % min(vocabulary, 997)
    alone = []
    start = 0
    for length in PROBE_LENGTHS:
        alone.append(model.model(input_ids=ids[None, start : start + length], use_cache=False).logits[0].float())
        start += length
    wanted = torch.cat(alone)
    layout = Layout.packed(PROBE_LENGTHS)
    for packs in (True, False):
        model.packs, model.attention_calls = packs, 0
        try:
            with model.using(layout):
                hidden = model.hidden(ids, positions_of(PROBE_LENGTHS, device))
                found = model.logits(hidden, layout.spans).float()
        except (TypeError, KeyError, ValueError):
            if not packs:
                raise
            continue  # this model's code does not take positions or our attention
        if packs and model.attention_calls == 0:
            continue
        if _near(found, wanted, model.base.dtype):
            return
    raise BaseModelError(
        f"{type(model.model).__name__} gives other logits through postil than by itself "
        f"(by {float((found - wanted).abs().max()):.2g}); this architecture is not supported"
    )


def _near(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> bool:
    bound = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}.get(dtype, 0.1)
    spread = float(wanted.std()) or 1.0
    return bool((found - wanted).abs().mean() <= bound * spread)
