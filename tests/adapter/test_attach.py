"""Attaching, switching, combining and removing adapters on one base, which stays bit for bit as it was."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import transformers

from postil.adapter import AdaptedModel, LoraConfig, attach, detach, linear
from postil.base import base_from_model, live_digest
from postil.data import template_hash
from postil.errors import AdapterError, BaseModelError, InternalError
from postil.kernels.dense import op
from postil.kernels.layout import Layout, Span, Spans, positions_of


def packed(model: AdaptedModel, ids: torch.Tensor, users: tuple[str | None, ...]) -> tuple[torch.Tensor, ...]:
    """Logits of the same sequence once per user, all in one pack."""
    n = len(ids)
    spans = Spans.of(Span(i * n, (i + 1) * n, model.resident(u).slot) for i, u in enumerate(users) if u)
    with torch.no_grad(), model.using(Layout.packed((n,) * len(users), spans)):
        hidden = model.hidden(ids.repeat(len(users)), positions_of((n,) * len(users)))
        return model.logits(hidden, spans).split(n)


def test_a_fresh_adapter_changes_nothing(lab: Any) -> None:
    base = lab.tiny()
    bare = lab.plain(base, lab.ids)
    configs = (
        LoraConfig(),
        LoraConfig(target_modules="all-linear", init="gaussian", use_rslora=True),
        LoraConfig(target_modules=("embed_tokens", "lm_head"), modules_to_save=("norm",)),
    )
    for config in configs:
        model = attach(base, config)
        torch.testing.assert_close(lab.plain(model, lab.ids), bare, rtol=0, atol=1e-6)
        detach(model)


def test_detaching_restores_every_bit_and_every_forward(lab: Any) -> None:
    base = lab.tiny("qwen2")
    before, bare = live_digest(base), lab.plain(base, lab.ids)
    own = {path: dict(module.__dict__) for path, module in base.named_modules()}
    model = attach(base, LoraConfig(target_modules=("attention", "embed_tokens", "lm_head"), bias="all"))
    lab.scramble(model)
    assert not torch.allclose(lab.plain(model, lab.ids), bare, atol=1e-3)
    assert live_digest(base) == before
    assert detach(model).model is base
    assert {path: module.__dict__.keys() for path, module in base.named_modules()} == {
        path: values.keys() for path, values in own.items()
    }
    assert torch.equal(lab.plain(base, lab.ids), bare)
    detach(attach(base, LoraConfig()))
    assert live_digest(base) == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_cpu_without_16_bit_products_multiplies_in_float32(
    name: str, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(known: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
        widened = 0

        def widens(x: torch.Tensor) -> bool:
            nonlocal widened
            widened += 1
            return not known

        monkeypatch.setattr(linear, "multiplies", lambda _dtype: known)
        monkeypatch.setattr(op, "widens", widens)
        base = lab.tiny(name).bfloat16()
        own = {path: dict(vars(module)) for path, module in base.named_modules()}
        model = attach(base, LoraConfig(target_modules=("attention",), bias="all"))
        assert bool(linear.slow_projections(lab.tiny(name).bfloat16())) is not known
        lab.scramble(model)
        leaves = model.resident("default").keys
        for leaf in leaves.values():
            leaf.requires_grad_()
        with model.using(Layout.packed((20,), Spans.of([Span(0, 20, model.resident("default").slot)]))):
            ids = torch.arange(20)
            loss, _, _ = model.loss(ids + 3, ids, (ids > 0) / 19)
            loss.backward()
        found = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
        detach(model)
        assert {path: vars(module).keys() for path, module in base.named_modules()} == {
            path: values.keys() for path, values in own.items()
        }
        return loss.detach(), found, widened

    (loss, found, none), (other, wide, some) = gradients(known=True), gradients(known=False)
    every = 2 * (2 * 4 + 1)  # forward and backward of the four or more linear layers of two blocks, and of the head
    assert none < some >= every  # a CPU with the products: only adapted layers ask, and are told no
    torch.testing.assert_close(other, loss, rtol=1e-2, atol=1e-2)
    assert found.keys() == wide.keys()
    assert found
    for key, grad in found.items():
        assert float((wide[key] - grad).norm() / grad.norm()) < 0.1, key


def test_a_model_that_the_user_loaded_is_frozen(lab: Any) -> None:
    base = lab.tiny().train().requires_grad_(True)
    model = attach(base, LoraConfig())
    assert not base.training
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert model.base.tokenizer is None
    assert attach(lab.tiny("opt")).residents == {}
    assert attach(base_from_model(lab.tiny())).active == {}


def test_a_recurrent_model_that_the_user_loaded_is_refused() -> None:
    config = transformers.MambaConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = transformers.MambaForCausalLM(config).train()
    with pytest.raises(BaseModelError, match=r"recurrent \(state-space\) model \(mamba\)"):
        attach(model, LoraConfig(target_modules=("in_proj",)))
    assert model.training


def test_enabling_and_disabling(lab: Any) -> None:
    base = lab.tiny()
    bare = lab.plain(base, lab.ids)
    model = attach(base, LoraConfig())
    lab.scramble(model)
    noted = lab.plain(model, lab.ids)
    with model.disabled():
        assert torch.equal(lab.plain(model, lab.ids), bare)
    assert torch.equal(lab.plain(model, lab.ids), noted)
    model.activate()
    assert torch.equal(lab.plain(model, lab.ids), bare)
    model.activate("default")
    assert torch.equal(lab.plain(model, lab.ids), noted)


def test_a_weighted_combination_is_the_sum_of_the_terms(lab: Any) -> None:
    model = attach(lab.tiny(), LoraConfig(r=4), name="a")
    attach(model, LoraConfig(r=2, alpha=1, target_modules=("q_proj", "down_proj")), name="b")
    lab.scramble(model, "a", seed=1)
    lab.scramble(model, "b", seed=2)
    module = model.model.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    outputs = {}
    for weights in ({}, {"a": 1.0}, {"b": 1.0}, {"a": 0.3, "b": -2.0}):
        model.activate(**weights)
        outputs[tuple(weights.items())] = module(x)
    bare, a, b, both = outputs.values()
    torch.testing.assert_close(both, bare + 0.3 * (a - bare) - 2 * (b - bare), rtol=0, atol=1e-5)
    assert (a - b).abs().max() > 1e-2


def test_the_term_is_scale_times_b_a_x(lab: Any) -> None:
    model = attach(lab.tiny(), LoraConfig(r=4, alpha=6, rank_pattern={"k_proj": 2}))
    lab.scramble(model)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for name, scale in (("q_proj", 6 / 4), ("k_proj", 6 / 2)):
        path = f"model.layers.1.self_attn.{name}"
        module, keys = model.model.get_submodule(path), model.resident("default").keys
        weight = module.weight + scale * keys[f"{path}.lora_B.weight"] @ keys[f"{path}.lora_A.weight"]
        torch.testing.assert_close(module(x), x @ weight.T, rtol=0, atol=1e-5)


def test_members_of_a_group_never_answer_for_another_input(lab: Any) -> None:
    model = attach(lab.tiny(), LoraConfig(), name="a")
    attach(model, LoraConfig(), name="b")
    lab.scramble(model, "a", seed=1)
    lab.scramble(model, "b", seed=2)
    model.activate("a")
    attention = model.model.get_submodule("model.layers.0.self_attn")
    x, other = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    expected = attention.k_proj(other.clone())
    attention.q_proj(x)
    assert torch.equal(attention.k_proj(other), expected)
    attention.q_proj(x)
    x.copy_(other)  # changed in place between two members
    assert torch.equal(attention.k_proj(x), expected)
    attention.q_proj(x)
    model.activate("b")  # other adapters between two members
    changed = attention.k_proj(x)
    assert torch.equal(changed, attention.k_proj(x.clone()))
    assert not torch.allclose(changed, expected)


def test_values_changed_in_place_between_two_members_count(lab: Any) -> None:
    model = attach(lab.tiny(), LoraConfig())
    lab.scramble(model)
    attention = model.model.get_submodule("model.layers.0.self_attn")
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    attention.q_proj(x)
    model.resident("default").flat.mul_(2)
    assert torch.equal(attention.k_proj(x), attention.k_proj(x.clone()))


def test_a_plain_call_that_fails_keeps_no_activation(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(lab.tiny(), LoraConfig())
    lab.scramble(model)
    attention = model.model.get_submodule("model.layers.1.self_attn")
    inputs = []

    def broken(x: torch.Tensor) -> torch.Tensor:
        inputs.append(weakref.ref(x))
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setitem(attention.k_proj.__dict__, "forward", broken)
        with pytest.raises(MemoryError) as caught:
            lab.plain(model, lab.ids)
    assert inputs[0]() is not None
    del caught
    gc.collect()
    assert inputs[0]() is None
    assert lab.plain(model, lab.ids).isfinite().all()


def test_a_detached_model_says_so(lab: Any) -> None:
    base = lab.tiny()
    model = attach(base, LoraConfig())
    model.checkpointing = True
    detach(model)
    assert (model.checkpointing, model.attention_calls, model.active, model.residents) == (False, {}, {}, {})
    for action in (
        lambda: model.activate("default"),
        lambda: model.activate(),
        lambda: model.add("other", LoraConfig()),
        lambda: model.remove("default"),
        lambda: model.export("default"),
        lambda: model.disabled().__enter__(),
        lambda: model.using(Layout.packed((3,))).__enter__(),
        lambda: attach(model, LoraConfig()),
        lambda: attach(model),
        lambda: detach(model),
    ):
        with pytest.raises(AdapterError, match="is detached from its base; attach"):
            action()
    detach(attach(base, LoraConfig()))


def test_names_with_dashes_are_activated_by_a_mapping(lab: Any) -> None:
    model = attach(lab.tiny(), LoraConfig(), name="my-note")
    attach(model, LoraConfig(), name="b")
    model.activate({"my-note": 0.5, "b": -1.0})
    assert model.active == {"my-note": 0.5, "b": -1.0}
    model.activate("my-note", b=0.25)
    assert model.active == {"my-note": 1.0, "b": 0.25}
    with pytest.raises(AdapterError, match="did you mean 'my-note'"):
        model.activate({"my-nose": 1.0})


def test_removing_frees_the_memory_and_the_slot_never_comes_again(lab: Any) -> None:
    model = attach(lab.tiny(), LoraConfig(target_modules=("attention", "embed_tokens")), name="a")
    attach(model, LoraConfig(modules_to_save=("lm_head",)), name="b")
    lab.scramble(model, "a", seed=1)
    lab.scramble(model, "b", seed=2)
    model.activate("b")
    wanted = lab.plain(model, lab.ids)
    model.activate("a")
    model.model.get_submodule("model.layers.0.self_attn.q_proj")(torch.ones(2, 32))  # leaves parts behind
    resident = weakref.ref(model.resident("a").flat)
    slot = model.resident("a").slot
    model.remove("a")
    gc.collect()
    assert resident() is None
    assert model.active == {}
    attach(model, LoraConfig(), name="c")
    assert model.resident("c").slot not in (slot, model.resident("b").slot)
    model.activate("b")
    assert torch.equal(lab.plain(model, lab.ids), wanted)
    for name in ("b", "c"):
        model.remove(name)
    assert not model.residents


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (LoraConfig(target_modules=("q_proj",), bias="all"), LoraConfig()),
        (LoraConfig(target_modules=("o_proj",), bias="all"), LoraConfig(bias="lora_only")),
        (LoraConfig(modules_to_save=("lm_head",)), LoraConfig(target_modules=("lm_head",))),
        (LoraConfig(modules_to_save=("embed_tokens",)), LoraConfig(target_modules=("embed_tokens",))),
        (LoraConfig(modules_to_save=("q_proj",), target_modules=("v_proj",)), LoraConfig()),
    ],
)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_module_replaced_by_one_and_adapted_by_another(
    one: LoraConfig, two: LoraConfig, swapped: bool, lab: Any
) -> None:
    """Whatever the order of attaching: each adapter beside the other is as it is alone on the base."""
    configs = {"one": one, "two": two}
    alone = {}
    for name, config in configs.items():
        model = attach(lab.tiny("qwen2"), config, name=name)
        lab.scramble(model, name, seed=len(config.bias))
        alone[name] = lab.plain(model, lab.ids)
    model = attach(lab.tiny("qwen2"))
    bare = lab.plain(model, lab.ids)
    for name in sorted(configs, reverse=swapped):
        attach(model, configs[name], name=name)
        lab.scramble(model, name, seed=len(configs[name].bias))
    for name, wanted in alone.items():
        model.activate(name)
        torch.testing.assert_close(lab.plain(model, lab.ids), wanted, rtol=0, atol=1e-5)
    found = packed(model, lab.ids, ("one", None, "two"))
    for logits, wanted in zip(found, (alone["one"], bare, alone["two"]), strict=True):
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)


def test_bias_all_and_lora_only(lab: Any) -> None:
    base = lab.tiny("gpt2")
    bare = lab.plain(base, lab.ids)
    for bias, count in (("none", 0), ("lora_only", 4), ("all", 13)):
        model = attach(base, LoraConfig(bias=bias))
        biases = [key for key in model.resident("default").keys if key.endswith(".bias")]
        assert len(biases) == count
        torch.testing.assert_close(lab.plain(model, lab.ids), bare, rtol=0, atol=1e-6)
        for key in biases:
            model.resident("default").keys[key].add_(0.5)
        assert torch.allclose(lab.plain(model, lab.ids), bare, atol=1e-3) == (count == 0)
        detach(model)


def test_modules_to_save_are_the_adapters_own(lab: Any) -> None:
    base = lab.tiny()
    model = attach(base, LoraConfig(modules_to_save=("lm_head",)))
    keys = model.resident("default").keys
    assert torch.equal(keys["lm_head.weight"], base.lm_head.weight)
    keys["lm_head.weight"].zero_()
    assert not lab.plain(model, lab.ids).any()
    model.activate()
    assert lab.plain(model, lab.ids).any()
    attach(model, LoraConfig(), name="other")
    with pytest.raises(AdapterError, match="default replaces whole modules"):
        model.activate("default", "other")


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])  # [1, tokens, heads, dim] and [1, heads, tokens, dim]
@pytest.mark.parametrize("length", [1, 2, 7])  # in a pack of two: 2 tokens (as many as key heads), 4 (as heads), 14
def test_a_norm_of_each_head_saved_whole_answers_for_its_own_tokens(name: str, length: int, lab: Any) -> None:
    model = attach(lab.tiny(name), LoraConfig(modules_to_save=("q_norm", "k_norm", "norm")), name="a")
    attach(model, LoraConfig(), name="b")
    for user in ("a", "b"):
        lab.scramble(model, user)
    ids = lab.ids[:length]
    for users in (("a", None), ("b", "a"), ("a", "a")):
        for found, user in zip(packed(model, ids, users), users, strict=True):
            model.activate(*([user] if user else []))
            torch.testing.assert_close(found, lab.plain(model, ids), rtol=0, atol=1e-5)


def test_seeds(lab: Any) -> None:
    def values(seed: int, **settings: Any) -> dict[str, torch.Tensor]:
        return attach(lab.tiny(), LoraConfig(**settings), seed=seed).export("default").tensors

    one, again, other = values(1), values(1), values(2)
    fewer = values(1, target_modules=("v_proj",))
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert not any(torch.equal(one[key], other[key]) for key in one if "lora_A" in key)
    assert all(torch.equal(fewer[key], one[key]) for key in fewer)  # a module's values depend on no other
    a = one["model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert 0.8 * 32**-0.5 < a.abs().max() <= 32**-0.5
    assert not any(one[key].any() for key in one if "lora_B" in key)


def test_an_adapter_goes_out_and_in_again(lab: Any) -> None:
    model = attach(lab.tiny(), LoraConfig(target_modules=("attention", "embed_tokens", "lm_head")))
    lab.scramble(model)
    adapter, wanted = model.export("default"), lab.plain(model, lab.ids)
    detach(model)
    assert torch.equal(lab.plain(attach(model.base, adapter), lab.ids), wanted)
    assert adapter.parameters == sum(tensor.numel() for tensor in adapter.tensors.values())
    assert adapter.ranks["lm_head"] == 8
    assert adapter.modules[0] == "model.layers.0.self_attn.q_proj"


def test_a_loaded_adapter_must_fit(lab: Any) -> None:
    model = attach(lab.tiny(), LoraConfig())
    adapter = model.export("default")
    detach(model)
    changed = lab.tiny()
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1
    with pytest.raises(AdapterError, match=r"belongs to another base.*--force"):
        attach(changed, adapter)
    detach(attach(changed, adapter, force=True))
    key = "model.layers.0.self_attn.q_proj.lora_A.weight"
    good = adapter.tensors[key]
    for broken, message in (
        (good[:2], r"shape \[2, 32\].*need \[8, 32\]"),
        (good * float("nan"), "NaN"),
        (None, f"missing {key}"),
    ):
        adapter.tensors.pop(key)
        adapter.tensors |= {} if broken is None else {key: broken}
        with pytest.raises(AdapterError, match=message):
            attach(model.base, adapter)


def test_what_speaks_against_an_adapter_is_noted(lab: Any) -> None:
    class Tokenizer:
        chat_template = "{{ messages }}"

    model = attach(lab.tiny(), LoraConfig())
    adapter = model.export("default")
    detach(model)
    model = attach(model.base, adapter)
    assert model.notes == []
    adapter.base["form"] = "bf16"
    adapter.card["template_hash"] = "of another template"
    attach(model, adapter, name="other")
    assert len(model.notes) == 1  # no tokenizer, so nothing to compare the template with
    assert "was made on the base in bf16, here it is in fp32" in model.notes[0]
    model.base.tokenizer = Tokenizer()
    attach(model, adapter, name="third")
    assert "another chat template" in model.notes[1]
    adapter.base = {}
    adapter.card["template_hash"] = template_hash(Tokenizer())
    attach(model, adapter, name="fourth")
    assert len(model.notes) == 1
    assert "carries no fingerprint of its base (made elsewhere)" in model.notes[0]
    adapter.base = {"source": "sha256:of another"}
    attach(model, adapter, name="fifth", force=True)
    assert "belongs to another base" in model.notes[0]
    attach(model, LoraConfig(), name="sixth")
    assert model.notes == []


def test_wrong_uses_are_named(lab: Any) -> None:
    base = lab.tiny()
    model = attach(base, LoraConfig(), name="french")
    with pytest.raises(AdapterError, match="has adapters attached already"):
        attach(base, LoraConfig())
    with pytest.raises(AdapterError, match="'french' is already attached"):
        attach(model, LoraConfig(), name="french")
    with pytest.raises(AdapterError, match="did you mean 'french'"):
        model.activate("frensh")
    with pytest.raises(InternalError, match="needs a Layout"):
        model.hidden(lab.ids, lab.ids)
    with model.using(Layout.packed((3,))):
        with pytest.raises(InternalError, match="do not nest"), model.using(Layout.packed((3,))):
            pass
        with pytest.raises(AdapterError, match="is running"):
            detach(model)
    detach(model)


def test_a_failed_attach_leaves_no_trace(lab: Any) -> None:
    base = lab.tiny()
    before = live_digest(base)
    with pytest.raises(AdapterError):
        attach(base, LoraConfig(target_modules=("nothing",)))
    assert live_digest(base) == before
    assert not any("forward" in module.__dict__ for module in base.modules())
    detach(attach(base, LoraConfig()))
