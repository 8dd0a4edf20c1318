"""Adapters on a 4-bit base: the same mathematics as on its dequantised weights, training, saving, and merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel

from postil.adapter import AdaptedModel, LoraConfig, attach, detach
from postil.adapter.export import export_merged
from postil.adapter.linear import projection_of
from postil.adapter.merge import merge
from postil.adapter.peft_files import load_adapter, save_adapter
from postil.base import Base, Nf4Linear, base_from_model, live_digest, load_base, nf4_layers
from postil.base.quantise import dequantised, quantise_model
from postil.data import Sample
from postil.errors import AdapterError, RecipeError
from postil.kernels.adapted_linear import AdapterSlot, Group, adapted_linear
from postil.kernels.adapted_linear.reference import adapted_linear_reference
from postil.kernels.layout import Layout, Span, Spans, positions_of
from postil.kernels.nf4 import quantise
from postil.training import train

ALL = LoraConfig(target_modules="all-linear")
CASES: dict[str, tuple[str, dict[str, Any], LoraConfig]] = {
    "llama": ("llama", {}, ALL),
    "llama, blocks within rows": ("llama", {"hidden_size": 64, "intermediate_size": 128}, ALL),
    "attention alone": ("llama", {}, LoraConfig(target_modules=("q_proj", "v_proj"))),
    "biases": ("qwen2", {}, LoraConfig(target_modules="all-linear", bias="all")),
    "conv1d": ("gpt2", {}, ALL),
    "fused": ("phi3", {}, ALL),
    "one sequence at a time": ("bloom", {}, ALL),
    "soft caps": ("gemma2", {}, ALL),
    "dropout": ("llama", {}, LoraConfig(target_modules="all-linear", dropout=0.5)),
    "embedding and head": ("llama", {}, LoraConfig(target_modules=("embed_tokens", "lm_head", "up_proj"))),
}


def samples(count: int = 9, vocabulary: int = 101) -> list[Sample]:
    random = np.random.default_rng(0)
    out = []
    for row in range(count):
        weights = np.ones(int(random.integers(4, 12)), dtype=np.float32)
        weights[0] = 0
        out.append(Sample(random.integers(3, vocabulary, len(weights)).astype(np.int32), weights, row + 1))
    return out


def loss_and_gradients(model: AdaptedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The losses of a pack of three sequences, and the gradient of every tensor of the adapter."""
    resident = model.resident("default")
    resident.train()
    lengths = (5, 1, 7)
    weights = torch.ones(13)
    weights[[0, 5, 6]] = 0
    layout = Layout.packed(lengths, Spans((Span(0, 13, resident.slot, 1.0, 7),)))
    with model.using(layout):
        total, nll, _ = model.loss(torch.arange(3, 16), positions_of(lengths), weights)
        total.backward()
    out = {key: leaf.grad.clone() for key, leaf in resident.leaves.items()}
    resident.train(False)
    return nll.detach(), out


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_on_the_dequantised_weights(case: str, lab: Any) -> None:
    name, settings, config = CASES[case]
    base: PreTrainedModel = lab.tiny(name, **settings)
    quantise_model(base)
    dense = dequantised(base)
    before = live_digest(base)
    ours, reference = attach(base, config), attach(dense, config)
    assert ours.packs == reference.packs
    assert ours.coverage("default") == reference.coverage("default")
    for model in (ours, reference):
        lab.scramble(model)
    torch.testing.assert_close(lab.plain(ours, lab.ids), lab.plain(reference, lab.ids), rtol=0, atol=2e-5)
    nll, gradients = loss_and_gradients(ours)
    wanted_nll, wanted = loss_and_gradients(reference)
    torch.testing.assert_close(nll, wanted_nll, rtol=0, atol=2e-5)
    assert gradients.keys() == wanted.keys()
    for key, gradient in wanted.items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-5, msg=key)
        assert bool(gradient.any()) or key.endswith("k_proj.bias")  # softmax does not see a shift of all keys
    assert live_digest(base) == before
    assert not any(tensor.requires_grad for tensor in [*base.parameters(), *base.buffers()])
    detach(ours)
    assert live_digest(base) == before


def test_gradients_through_recomputed_layers_are_the_same(lab: Any) -> None:
    base = lab.tiny()
    quantise_model(base)
    model = attach(base, ALL)
    lab.scramble(model)
    _, wanted = loss_and_gradients(model)
    model.checkpointing = True
    _, found = loss_and_gradients(model)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_the_op_on_a_4_bit_group_is_the_reference_on_its_dense_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    layers, dense = [], []
    for d_out in (48, 16, 16):
        bias = torch.nn.Parameter(torch.randn(d_out, generator=generator), requires_grad=False)
        layer = Nf4Linear(64, d_out, bias)
        layer.fill(quantise(torch.randn(d_out, 64, generator=generator)))
        layers.append(layer)
        linear = torch.nn.Linear(64, d_out)
        linear.load_state_dict({"weight": layer.dense(), "bias": bias})
        dense.append(linear.requires_grad_(False))
    assert projection_of(layers[0]) is layers[0]

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    slots = {
        0: AdapterSlot(leaf(6, 64), (leaf(48, 2), leaf(16, 2), leaf(16, 2)), (0.5, 1.0, 2.0), (leaf(48), None, None)),
        3: AdapterSlot(leaf(4, 64), (leaf(48, 4), None, None), (1.5, 0.0, 0.0), (None, None, None), 0.3),
    }
    spans = Spans((Span(0, 5, 0), Span(5, 9, 3, 0.5, 11), Span(4, 12, 0, -1.0)))
    x = torch.randn(13, 64, generator=generator).requires_grad_()
    found = adapted_linear(x, Group("g", layers, slots), spans)
    wanted = adapted_linear_reference(x, Group("g", [projection_of(linear) for linear in dense], slots), spans)
    tensors = [x, *(t for slot in slots.values() for t in slot.tensors() if t is not None)]
    weights = [torch.randn(y.shape, generator=generator) for y in wanted]
    outcomes = []
    for outputs in (found, wanted):
        total = torch.stack([(y * w).sum() for y, w in zip(outputs, weights, strict=True)]).sum()
        outcomes.append(torch.autograd.grad(total, tensors))
    for y, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(y, other)
    for gradient, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-4)


def test_packed_is_solo_and_adapters_keep_to_their_rows(lab: Any) -> None:
    base = lab.tiny()
    quantise_model(base)
    bare = lab.plain(base, lab.ids)
    model = attach(base, ALL, name="a")
    attach(model, LoraConfig(r=2), name="b")
    lab.scramble(model, "a", seed=1)
    lab.scramble(model, "b", seed=2)
    n = len(lab.ids)
    spans = Spans((Span(0, n, model.resident("a").slot), Span(2 * n, 3 * n, model.resident("b").slot)))
    with torch.no_grad(), model.using(Layout.packed((n, n, n), spans)):
        hidden = model.hidden(lab.ids.repeat(3), positions_of((n, n, n)))
        parts = model.logits(hidden, spans).split(n)
    alone = []
    for names in (("a",), (), ("b",)):
        model.activate(*names)
        alone.append(lab.plain(model, lab.ids))
    for part, wanted in zip(parts, alone, strict=True):
        torch.testing.assert_close(part, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(parts[1], bare, rtol=0, atol=1e-5)
    assert (parts[0] - parts[1]).abs().max() > 1e-2


# Training and files


@pytest.fixture
def directory(lab: Any, tmp_path: Path) -> Path:
    """A tiny dense Llama directory with a tokenizer."""
    model = lab.tiny()
    model.save_pretrained(tmp_path / "dense")
    words = sorted(pre_tokenizers.ByteLevel.alphabet())[:90]
    inner = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def trained(directory: Path, tmp_path: Path) -> Path:
    """An adapter trained for three steps on the 4-bit form of it."""
    model = attach(load_base(directory, quant="nf4"), ALL, seed=1)
    adapter = train(model, samples(), method="qlora", steps=3, batch_size=3, warmup=0, learning_rate=1e-2)
    assert adapter is not None
    return save_adapter(adapter, tmp_path / "adapter")


def test_training_moves_the_adapter_and_no_bit_of_the_base(directory: Path) -> None:
    base = load_base(directory, quant="nf4")
    before = live_digest(base.model)
    losses: list[float] = []
    runs = []
    for _ in range(2):
        model = attach(base, ALL, seed=1)
        adapter = train(
            model, samples(), method="qlora", steps=6, batch_size=9, warmup=0, learning_rate=1e-2,
            watch=lambda event: losses.append(event["loss"]),
        )  # fmt: skip
        assert adapter is not None
        runs.append(adapter.tensors)
        assert live_digest(base.model) == before
        detach(model)
    assert losses[5] < losses[0] - 0.01
    assert all(torch.equal(tensor, runs[1][key]) for key, tensor in runs[0].items())  # the same bytes again


def test_an_adapter_of_the_4_bit_form_loads_on_the_dense_base_with_a_note(directory: Path, trained: Path) -> None:
    written = json.loads((trained / "postil.json").read_text())["base"]
    dense = load_base(directory)
    assert written == {"source": dense.fingerprint().source, "form": "nf4"}
    model = attach(dense, load_adapter(trained))
    assert len(model.notes) == 1
    assert "made on the base in nf4, here it is in fp32" in model.notes[0]
    again = attach(load_base(directory, quant="nf4"), load_adapter(trained))
    assert again.notes == []


def test_methods_that_do_not_fit_the_form_are_refused(directory: Path) -> None:
    model = attach(load_base(directory, quant="nf4"))
    with pytest.raises(RecipeError, match="method full changes every weight, and 4-bit weights cannot be"):
        train(model, samples(), method="full")
    with pytest.raises(RecipeError, match="method qlora needs a 4-bit base"):
        train(attach(load_base(directory), ALL), samples(), method="qlora")
    attach(model, ALL)
    assert train(model, samples(), method="lora", steps=1) is not None  # the same thing as qlora


def test_a_run_goes_on_only_in_its_own_dtype(directory: Path, tmp_path: Path) -> None:
    from postil.errors import RunError

    def run(dtype: str, steps: int) -> None:
        model = attach(load_base(directory, quant="nf4", dtype=dtype), ALL)
        train(model, samples(), method="qlora", steps=steps, out=tmp_path / "run")

    run("float32", 2)
    run("float32", 2)
    with pytest.raises(RunError):
        run("bfloat16", 2)


def test_whole_modules_of_4_bits_cannot_be_trained(lab: Any) -> None:
    base = lab.tiny()
    quantise_model(base)
    for name in ("up_proj", "mlp"):
        with pytest.raises(AdapterError, match=r"modules_to_save: model\.layers\.0\.mlp\.\w+ is held in 4 bits"):
            attach(base, LoraConfig(modules_to_save=(name,)))
    model = attach(base, LoraConfig(modules_to_save=("lm_head", "norm")))
    assert set(model.resident("default").saved) == {"lm_head", "model.norm"}


# Merging


def loaded(directory: Path) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def test_merging_into_4_bits_is_refused_with_the_mend(directory: Path, trained: Path) -> None:
    base = load_base(directory, quant="nf4")
    model = attach(base, load_adapter(trained))
    before = live_digest(base.model)
    with pytest.raises(AdapterError, match=r"never quantised again: .*with export_merged"):
        merge(model, "default")
    assert live_digest(base.model) == before
    assert model.active == {"default": 1.0}


def test_an_export_asks_what_to_merge_into(directory: Path, trained: Path, tmp_path: Path) -> None:
    base, adapter = load_base(directory, quant="nf4"), load_adapter(trained)
    with pytest.raises(
        AdapterError, match=r"say what to merge into, with into=\"original\" .* or into=\"dequantised\""
    ):
        export_merged(base, adapter, tmp_path / "whole")
    with pytest.raises(AdapterError, match="not 'dense'"):
        export_merged(base, adapter, tmp_path / "whole", into="dense")
    with pytest.raises(AdapterError, match="is for a 4-bit base"):
        export_merged(load_base(directory), adapter, tmp_path / "whole", into="original")
    assert not (tmp_path / "whole").exists()
    detach(attach(base))  # and nothing was left on it


def test_an_export_into_the_original_is_that_of_the_dense_base(
    directory: Path, trained: Path, tmp_path: Path
) -> None:
    base, adapter = load_base(directory, quant="nf4"), load_adapter(trained)
    written = export_merged(base, adapter, tmp_path / "whole", into="original")
    plain = export_merged(load_base(directory), adapter, tmp_path / "plain")
    ours, wanted = loaded(written.path), loaded(plain.path)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), wanted.parameters(), strict=True))
    assert plain.from_nf4 is None
    assert written.from_nf4 is not None
    assert written.from_nf4.max_logit > 10 * written.drift.max_logit  # 4 bits are far from 32
    model = attach(base, adapter)
    ids = torch.arange(3, 15)
    with torch.no_grad():
        apart = (model.model(ids[None]).logits - ours(ids[None]).logits).abs().max()
    assert 0 < float(apart) < 10 * written.from_nf4.max_logit


def test_an_export_into_a_dequantised_copy_answers_as_on_4_bits(
    directory: Path, trained: Path, tmp_path: Path
) -> None:
    base = load_base(directory, quant="nf4")
    model = attach(base, load_adapter(trained), name="a")
    attach(model, LoraConfig(r=2), name="b")
    model.activate("a")
    before = live_digest(base.model)
    written = export_merged(model, {"a": 0.5, "b": 1.0}, tmp_path / "whole", into="dequantised")
    assert written.from_nf4 is not None
    assert written.from_nf4.max_logit < 1e-4
    assert live_digest(base.model) == before
    assert model.active == {"a": 1.0}
    model.activate(a=0.5, b=1.0)
    ids = torch.arange(3, 15)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(written.path)(ids[None]).logits, model.model(ids[None]).logits, rtol=0, atol=1e-4
        )


def test_an_original_that_is_not_there_is_refused(lab: Any, trained: Path, tmp_path: Path) -> None:
    model = lab.tiny()
    quantise_model(model)
    base: Base = base_from_model(model)
    adapted = attach(base, ALL)
    with pytest.raises(AdapterError, match="its 16-bit weights cannot be read"):
        export_merged(adapted, "default", tmp_path / "whole", into="original")
    assert export_merged(adapted, "default", tmp_path / "whole", into="dequantised").path.is_dir()


def test_conv1d_exports_in_its_own_orientation(lab: Any, tmp_path: Path) -> None:
    base = lab.tiny("gpt2")
    quantise_model(base)
    assert {layer.conv1d for _, layer in nf4_layers(base)} == {True}
    model = attach(base, ALL)
    lab.scramble(model)
    wanted = lab.plain(model, lab.ids)
    assert model.export("default").card == {"fan_in_fan_out": True}
    written = export_merged(model, "default", tmp_path / "whole", into="dequantised")
    torch.testing.assert_close(lab.plain(loaded(written.path), lab.ids), wanted, rtol=0, atol=1e-4)
