"""Adapters at a weight: modules saved whole, biases and low-rank terms stand between the base's and their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from postil.adapter import AdaptedModel, LoraConfig, attach
from postil.adapter.export import export_merged
from postil.adapter.merge import merge, unmerge
from postil.errors import AdapterError
from postil.kernels.layout import Layout, Span, Spans, positions_of

WHOLE = LoraConfig(modules_to_save=("norm", "lm_head"))
KINDS: dict[str, tuple[str, LoraConfig]] = {
    "saved": ("llama", WHOLE),
    "saved embedding": ("llama", LoraConfig(modules_to_save=("embed_tokens",))),
    "saved conv1d": ("gpt2", LoraConfig(target_modules=("c_proj",), modules_to_save=("c_attn", "ln_f"))),
    "saved norm of heads": ("qwen3", LoraConfig(modules_to_save=("q_norm",))),
    "biases": ("gpt2", LoraConfig(bias="all")),
    "biases of adapted modules": ("qwen2", LoraConfig(bias="lora_only")),
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, lab: Any) -> AdaptedModel:
    name, config = KINDS[request.param]
    model = attach(lab.tiny(name), config)
    lab.scramble(model, size=0.3)
    return model


def by_hand(model: AdaptedModel, lab: Any, weight: float) -> torch.Tensor:
    """The logits with W + w (W' - W) as the base's own parameters and w times the low-rank term."""
    resident = model.resident("default")
    model.activate()
    whole = {key: view for key, view in resident.keys.items() if ".lora_" not in key}
    own = {key: model.model.get_parameter(key) for key in whole}
    before = {key: parameter.clone() for key, parameter in own.items()}
    low_rank = resident.flat.clone()
    with torch.no_grad():
        for key, value in whole.items():
            own[key].copy_(before[key].double() * (1 - weight) + value.double() * weight)
            value.copy_(own[key])  # at its own weight of 1, what is saved changes nothing more
    try:
        model.activate({"default": weight})
        scales = {group: slot.scales for group, slot in resident.groups.items()}
        for slot in resident.groups.values():
            slot.scales = tuple(weight * scale for scale in slot.scales)
        model.activate("default")
        return lab.plain(model, lab.ids)
    finally:
        for group, slot in resident.groups.items():
            slot.scales = scales[group]
        with torch.no_grad():
            resident.flat.copy_(low_rank)
            for key, value in before.items():
                own[key].copy_(value)


@pytest.mark.parametrize("weight", [0.5, -0.25, 1.5, 1e-6])
def test_a_weight_stands_between_the_base_and_the_adapter(model: AdaptedModel, lab: Any, weight: float) -> None:
    expected = by_hand(model, lab, weight)
    model.activate({"default": weight})
    torch.testing.assert_close(lab.plain(model, lab.ids), expected, rtol=0, atol=2e-5)


def test_no_weight_is_the_base_and_the_whole_one_the_adapter(model: AdaptedModel, lab: Any) -> None:
    whole = lab.plain(model, lab.ids)
    model.activate()
    base = lab.plain(model, lab.ids)
    assert not torch.allclose(base, whole, atol=1e-2)
    model.activate({"default": 0.0})
    assert torch.equal(lab.plain(model, lab.ids), base)
    model.activate({"default": 1.0})
    assert torch.equal(lab.plain(model, lab.ids), whole)
    for weight, near in ((1e-6, base), (1 - 1e-6, whole)):  # no jump beside them
        model.activate({"default": weight})
        torch.testing.assert_close(lab.plain(model, lab.ids), near, rtol=0, atol=1e-3)


@pytest.mark.parametrize("weight", [1e-6, 0.4, 1.0])
def test_merging_at_a_weight_is_the_adapter_at_that_weight(
    model: AdaptedModel, lab: Any, weight: float, tmp_path: Any
) -> None:
    model.activate({"default": weight})
    wanted = lab.plain(model, lab.ids)
    drift = export_merged(model, {"default": weight}, tmp_path / "whole").drift
    assert drift.max_logit < 1e-4
    merge(model, {"default": weight})
    torch.testing.assert_close(lab.plain(model, lab.ids), wanted, rtol=0, atol=1e-4)
    unmerge(model)
    assert torch.equal(lab.plain(model, lab.ids), wanted)


def test_every_row_of_a_pack_has_its_own_weight(model: AdaptedModel, lab: Any) -> None:
    slot, weights = model.resident("default").slot, (0.5, 0.0, 1.0, -1.0, None)
    lengths = [len(lab.ids)] * len(weights)
    spans = Spans(tuple(
        Span(index * len(lab.ids), (index + 1) * len(lab.ids), slot, weight)
        for index, weight in enumerate(weights) if weight is not None
    ))  # fmt: skip
    with torch.no_grad(), model.using(Layout.packed(lengths, spans)):
        hidden = model.hidden(lab.ids.repeat(len(weights)), positions_of(lengths))
        packed = model.logits(hidden, spans).split(lengths)
    for weight, got in zip(weights, packed, strict=True):
        model.activate({"default": weight or 0.0})
        torch.testing.assert_close(got, lab.plain(model, lab.ids), rtol=0, atol=2e-5)


def test_a_weight_halves_the_gradient_of_what_is_saved_whole(lab: Any) -> None:
    """By finite differences: the loss at w moves by w times what moves the parameter."""
    model = attach(lab.tiny(), WHOLE)
    lab.scramble(model)
    resident = model.resident("default")
    resident.train()
    norm = resident.keys["model.norm.weight"]
    slope = torch.randn(norm.shape, generator=torch.Generator().manual_seed(4))

    def loss() -> torch.Tensor:
        logits: torch.Tensor = model.model(input_ids=lab.ids[None], use_cache=False).logits.double()
        return logits.logsumexp(-1).sum()

    found = []
    for weight in (1.0, 0.5, 1e-6):
        model.activate({"default": weight})
        norm.grad.zero_()
        loss().backward()
        along = float((norm.grad * slope).sum())
        with torch.no_grad():
            norm += 1e-2 * slope
            more = float(loss())
            norm -= 2e-2 * slope
            less = float(loss())
            norm += 1e-2 * slope
        assert along == pytest.approx((more - less) / 2e-2, rel=2e-2, abs=1e-2)
        found.append(along)
    assert abs(found[2]) < 1e-4 * abs(found[0])
    assert 0.2 * abs(found[0]) < abs(found[1]) < 0.8 * abs(found[0])


def test_in_16_bits_the_share_is_taken_in_float32_and_rounded_once(lab: Any) -> None:
    model = attach(lab.tiny().to(torch.bfloat16), WHOLE)
    lab.scramble(model, size=0.3)
    key = "model.norm.weight"
    own, saved = model.model.get_parameter(key), model.resident("default").keys[key]
    expected = (own.float() + 0.3 * (saved - own.float())).to(torch.bfloat16)
    assert not torch.equal(expected, own + (0.3 * (saved.bfloat16() - own)))
    model.activate({"default": 0.3})
    wanted = lab.plain(model, lab.ids)
    merge(model, {"default": 0.3}, bound=9)
    assert (model.model.get_parameter(key) == expected).float().mean() > 0.95  # the last bit of float32 may differ
    unmerge(model)
    assert torch.equal(lab.plain(model, lab.ids), wanted)


def test_a_weight_of_zero_stands_beside_modules_saved_whole(lab: Any) -> None:
    model = attach(lab.tiny(), WHOLE, name="whole")
    attach(model, LoraConfig(), name="other")
    lab.scramble(model, "whole")
    lab.scramble(model, "other")
    for weights, same in (
        ({"whole": 0.5, "other": 0.0}, {"whole": 0.5}),
        ({"whole": 0.0, "other": 0.5}, {"other": 0.5}),
    ):
        model.activate(weights)
        got = lab.plain(model, lab.ids)
        model.activate(same)
        assert torch.equal(lab.plain(model, lab.ids), got)
    attach(model, LoraConfig(), name="third")
    model.activate({"whole": 0.0, "other": 0.5, "third": 0.5})
    with pytest.raises(AdapterError, match="cannot be combined"):
        model.activate({"whole": 0.5, "other": 1e-3})


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(lab: Any, weight: float) -> None:
    model = attach(lab.tiny(), LoraConfig())
    for ask in (lambda: model.activate({"default": weight}), lambda: merge(model, {"default": weight})):
        with pytest.raises(AdapterError, match=r"the weight of 'default' is (nan|inf); give a finite number"):
            ask()
