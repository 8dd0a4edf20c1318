"""Stand-ins of a model's forwards: no copy computes with another's layers, no recomputation with other values."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from postil.adapter import AdaptedModel, LoraConfig, attach, detach
from postil.base import live_digest
from postil.errors import AdapterError
from postil.kernels.layout import Layout, positions_of

EVERY = LoraConfig(r=4, target_modules=("q_proj", "down_proj", "embed_tokens"), modules_to_save=("norm",))
LONG = "phi3-longrope"
COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda what: torch.save(what, io.BytesIO()),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("what", ["adapted", "model", "base", "layer", "projection", "rotary", "in a list"])
def test_a_copy_of_what_has_adapters_on_it_is_refused(how: str, what: str, lab: Any) -> None:
    """Its layers would have computed with the original's."""
    name = LONG if what == "rotary" else "llama"
    config = LoraConfig(r=4, target_modules="all-linear") if what == "rotary" else EVERY
    adapted = attach(lab.tiny(name), config)
    inner = adapted.model.model
    parts = {
        "adapted": adapted, "model": adapted.model, "base": adapted.base, "layer": inner.layers[1],
        "projection": inner.layers[0].mlp.down_proj, "rotary": inner.rotary_emb, "in a list": [1, adapted.model],
    }  # fmt: skip
    before = lab.plain(adapted, lab.ids)
    with pytest.raises(
        AdapterError, match=r"cannot be copied or pickled: save the adapter .*, detach, copy the base"
    ):
        COPIES[how](parts[what])
    assert torch.equal(lab.plain(adapted, lab.ids), before)


def test_16_bit_layers_that_are_multiplied_apart_are_refused_too(lab: Any) -> None:
    adapted = attach(lab.tiny().to(torch.bfloat16))
    with pytest.raises(AdapterError, match="cannot be copied or pickled"):
        copy.deepcopy(adapted.model)


def test_the_advice_works(lab: Any) -> None:
    adapted = attach(lab.tiny(), EVERY)
    lab.scramble(adapted)
    wanted, adapter = lab.plain(adapted, lab.ids), adapted.export("default")
    base = detach(adapted)
    twin = copy.deepcopy(base.model)
    pickle.loads(pickle.dumps(base.model))
    digest = live_digest(base.model)
    adapter.base = {}
    other = attach(twin, adapter)
    assert torch.equal(lab.plain(other, lab.ids), wanted)
    with torch.no_grad():
        for parameter in twin.model.layers.parameters():
            parameter.zero_()
    assert not torch.allclose(lab.plain(other, lab.ids), wanted, atol=1e-2)
    assert live_digest(base.model) == digest
    assert torch.equal(lab.plain(attach(base, adapter), lab.ids), wanted)


def test_stand_ins_keep_the_signature_that_transformers_asks_for(lab: Any) -> None:
    model = lab.tiny()
    before = inspect.signature(model.forward), inspect.signature(model.model.layers[0].forward)
    attach(model, EVERY)
    assert (inspect.signature(model.forward), inspect.signature(model.model.layers[0].forward)) == before


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("written", ["b", "a", "flat", "another adapter"])
def test_values_written_between_the_passes_are_noticed(checkpointing: bool, written: str, lab: Any) -> None:
    """In the backward pass itself, and by a recomputation, which would go by the new values."""
    model: AdaptedModel = attach(lab.tiny(), LoraConfig(r=4, target_modules=("q_proj", "down_proj")))
    lab.scramble(model)
    other = model.add("other", LoraConfig(r=2))
    resident = model.resident("default")
    resident.train()
    model.checkpointing = checkpointing
    tokens = len(lab.ids)
    with model.using(Layout.packed([tokens], model.spans_for({"default": 1.0}, tokens))):
        total = model.hidden(lab.ids, positions_of([tokens])).square().sum()
    leaves, path = resident.leaves, "model.layers.0.mlp.down_proj"
    values = {
        "b": leaves[f"{path}.b"],
        "a": leaves[f"{path}.a"],
        "flat": resident.flat,
        "another adapter": other.flat,
    }
    with torch.no_grad():
        values[written].mul_(2)
    if written == "another adapter":
        total.backward()
        assert resident.grad is not None
        assert resident.grad.any()
        return
    said = "written to after the forward pass" if checkpointing else "modified by an inplace operation"
    with pytest.raises(AdapterError if checkpointing else RuntimeError, match=said):
        total.backward()
