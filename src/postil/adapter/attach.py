"""attach and detach: stick adapters on a base, and take everything off again, the base bit for bit as it was."""

from __future__ import annotations

from transformers import PreTrainedModel

from postil.adapter.adapter import Adapter
from postil.adapter.config import LoraConfig
from postil.adapter.model import AdaptedModel
from postil.adapter.probe import probe
from postil.base import Base, base_from_model
from postil.data import template_hash
from postil.errors import AdapterError


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
    fingerprint names another base. What else speaks against the adapter's fit is in the model's `notes`.
    Raises AdapterError, BaseModelError.
    """
    if isinstance(target, AdaptedModel):
        model = target
        model.check_attached()
    else:
        base = target if isinstance(target, Base) else base_from_model(target)
        if any("_postil_owner" in module.__dict__ for module in base.model.modules()):
            raise AdapterError("this base has adapters attached already; pass the AdaptedModel, or detach it first")
        model = AdaptedModel(base)
        try:
            probe(model)
        except BaseException:
            model.take_off()
            raise
    model.notes = []
    if adapter is not None:
        try:
            if isinstance(adapter, Adapter):
                model.notes = check_base(adapter, model.base, force=force)
            model.add(name, adapter, seed=seed)
        except BaseException:
            if target is not model:
                model.take_off()
            raise
        model.activate(name)
    return model


def detach(model: AdaptedModel) -> Base:
    """Take every adapter off; returns the base, bit for bit as before `attach`."""
    model.check_attached()
    if model.merged:
        raise AdapterError("an adapter is merged into the base; unmerge it before detaching")
    if model.layout is not None:
        raise AdapterError("the model is running; detach it afterwards")
    model.take_off()
    return model.base


def check_base(adapter: Adapter, base: Base, *, force: bool = False) -> list[str]:
    """What speaks against the adapter on this base without forbidding it, as sentences for the user.

    They name: no fingerprint, another numeric form, another chat template. Raises AdapterError when the adapter
    names another base than this one, both in the message (`force`: then a sentence like the others).
    """
    notes = []
    wanted = adapter.base.get("source")
    if wanted is None:
        notes.append(
            f"the adapter carries no fingerprint of its base (made elsewhere): whether it fits {base.source} "
            "cannot be checked beyond the shapes of its tensors"
        )
    else:
        here = base.fingerprint()
        form = adapter.base.get("form")
        if wanted != here.source:
            other = f"it was made for {adapter.base_name or 'a base'} ({wanted[:23]}…), this is"
            problem = f"the adapter belongs to another base: {other} {base.source} ({here.source[:23]}…)"
            if not force:
                raise AdapterError(
                    f"{problem}; load that base, or pass force=True (generate, chat and merge: --force) if you "
                    "know better"
                )
            notes.append(problem)
        elif form and form != here.form:
            notes.append(
                f"the adapter was made on the base in {form}, here it is in {here.form}: answers may differ slightly"
            )
    template = adapter.card.get("template_hash")
    if template and base.tokenizer is not None and template != template_hash(base.tokenizer):
        notes.append(
            "the adapter was trained with another chat template than this base's tokenizer has: its answers to "
            "chat messages may be worse"
        )
    return notes
