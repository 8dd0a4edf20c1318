"""A 4-bit base while loading: which layers, which bytes, what stays as stored, and how much memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from postil.base import Nf4Linear, live_digest, load_base, logical_parameters, nf4_layers
from postil.base.quantise import dequantised, quantised_bytes
from postil.errors import BaseModelError, InternalError
from postil.kernels.nf4 import Nf4Weight, dequantise, quantise

Make = Callable[..., Path]
IDS = torch.arange(3, 20)[None]
TINY = {"vocab_size": 259, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def same(ours: Nf4Weight, wanted: Nf4Weight) -> bool:
    """Whether two 4-bit weights agree in every bit."""
    a, b = ours.tensors(), wanted.tensors()
    return a.keys() == b.keys() and ours.shape == wanted.shape and all(torch.equal(a[key], b[key]) for key in a)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits[0]


def make(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**TINY | settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def spoil(directory: Path, name: str, value: float) -> None:
    path = directory / "model.safetensors"
    state = {key: tensor.clone() for key, tensor in load_file(path).items()}
    state[name].view(-1)[7] = value
    save_file(state, path, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_linear_layers_of_the_decoder_are_quantised_and_all_else_is_as_stored(
    make_directory: Make, dtype: torch.dtype, tied: bool
) -> None:
    directory = make_directory(dtype=dtype, tie_word_embeddings=tied)
    stored = load_file(directory / "model.safetensors")
    base = load_base(directory, quant="nf4")
    layers = dict(nf4_layers(base.model))
    assert layers.keys() == {name.removesuffix(".weight") for name in stored if "_proj" in name}
    for path, layer in layers.items():
        weight = stored[f"{path}.weight"]
        assert same(layer.nf4, quantise(weight))
        assert layer.nf4.dtype is dtype
        assert not list(layer.parameters())
    rest = {name: tensor for name, tensor in stored.items() if "_proj" not in name}
    live = dict(base.model.named_parameters())
    assert rest.keys() == live.keys()
    assert all(torch.equal(rest[name], live[name]) and live[name].dtype is dtype for name in rest)
    assert (base.model.lm_head.weight is base.model.model.embed_tokens.weight) is tied
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert base.quantised
    assert base.dtype is dtype
    assert not hasattr(base.config, "quantization_config")
    for name, tensor in [*base.model.named_parameters(), *base.model.named_buffers()]:
        assert tensor.data_ptr() % 64 == 0, name
        assert tensor.device.type == "cpu", name
    assert logical_parameters(base.model) == sum(tensor.numel() for tensor in stored.values())


def test_products_are_those_of_the_dequantised_weights(make_directory: Make) -> None:
    directory = make_directory()
    base = load_base(directory, quant="nf4")
    twin = dequantised(base.model)
    assert not list(nf4_layers(twin))
    assert torch.equal(
        twin.model.layers[1].mlp.up_proj.weight, dequantise(base.model.model.layers[1].mlp.up_proj.nf4)
    )
    torch.testing.assert_close(logits(base.model), logits(twin), rtol=0, atol=1e-5)
    apart = (logits(load_base(directory).model) - logits(twin)).abs().max()
    assert apart > 1e-3  # 4 bits are not 32
    assert twin.model.embed_tokens.weight is base.model.model.embed_tokens.weight


SETTINGS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}, {"c_attn", "c_fc", "c_proj"}),
    "phi3": ("Phi3", {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                      "num_key_value_heads": 2, "max_position_embeddings": 64},
             {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "opt": ("OPT", {"hidden_size": 64, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                    "word_embed_proj_dim": 32}, {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    "mixtral": ("Mixtral", {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
                            "num_local_experts": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
                            "max_position_embeddings": 64},
                {"q_proj", "k_proj", "v_proj", "o_proj"}),
    "qwen2_moe": ("Qwen2Moe", {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_experts": 4,
                               "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
                               "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64},
                  {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_other_architectures(make_directory: Make, name: str) -> None:
    kind, settings, names = SETTINGS[name]
    directory = make_directory(model=make(kind, **settings))
    base = load_base(directory, quant="nf4")
    assert {path.rpartition(".")[2] for path, _ in nf4_layers(base.model)} == names
    dense = load_base(directory)
    for path, layer in nf4_layers(base.model):
        module = dense.model.get_submodule(path)
        weight = module.weight.T if layer.conv1d else module.weight
        assert same(layer.nf4, quantise(weight.contiguous()))
        assert (layer.bias is None) == (module.bias is None)
        if layer.bias is not None:
            assert torch.equal(layer.bias, module.bias)
        assert layer.dense().shape == module.weight.shape
    torch.testing.assert_close(logits(base.model), logits(dequantised(base.model)), rtol=0, atol=1e-5)
    assert logical_parameters(base.model) == sum(parameter.numel() for parameter in dense.model.parameters())


def test_names_without_the_inner_models_prefix(make_directory: Make) -> None:
    directory = make_directory(model=make("GPT2", **SETTINGS["gpt2"][1]))
    wanted = live_digest(load_base(directory, quant="nf4").model)
    path = directory / "model.safetensors"
    state = {key.removeprefix("transformer."): tensor.clone() for key, tensor in load_file(path).items()}
    save_file(state, path, metadata={"format": "pt"})
    assert live_digest(load_base(directory, quant="nf4").model) == wanted


def test_a_model_without_plain_linear_layers_is_refused(make_directory: Make) -> None:
    model = make("Falcon", hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with pytest.raises(BaseModelError, match="FalconForCausalLM has no linear layers that can be held in 4 bits"):
        load_base(make_directory(model=model), quant="nf4")


def test_a_sharded_directory_is_the_same(make_directory: Make) -> None:
    whole, sharded = make_directory("whole"), make_directory("sharded", shard="20KB")
    ours, theirs = load_base(whole, quant="nf4"), load_base(sharded, quant="nf4")
    assert live_digest(ours.model) == live_digest(theirs.model)
    assert ours.fingerprint() == theirs.fingerprint()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(directory: Path, value: float) -> None:
    spoil(directory, "model.layers.1.mlp.up_proj.weight", value)
    with pytest.raises(BaseModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(directory, quant="nf4")


def test_missing_and_stray_tensors_are_refused_as_for_a_dense_base(directory: Path) -> None:
    path = directory / "model.safetensors"
    state = load_file(path)
    taken = state.pop("model.layers.0.mlp.up_proj.weight").clone()
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"lacks 1 tensors .*: model\.layers\.0\.mlp\.up_proj\.weight"):
        load_base(directory, quant="nf4")
    state["model.layers.0.mlp.up_proj.weight"] = taken[:, :-1].contiguous()
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        load_base(directory, quant="nf4")


def test_another_form_is_refused_with_the_nearest(directory: Path) -> None:
    with pytest.raises(BaseModelError, match=r"'nf5' is no 4-bit form of a base \(did you mean 'nf4'\?\)"):
        load_base(directory, quant="nf5")


def test_the_fingerprint_has_the_dense_source_and_its_own_form(directory: Path) -> None:
    dense, base = load_base(directory).fingerprint(), load_base(directory, quant="nf4").fingerprint()
    assert base.source == dense.source
    assert (dense.form, base.form) == ("fp32", "nf4")


def test_the_live_digest_covers_codes_and_scales(directory: Path) -> None:
    base = load_base(directory, quant="nf4")
    before = live_digest(base.model)
    layer = base.model.model.layers[0].self_attn.q_proj
    for name in ("packed", "absmax", "nested_absmax", "offset"):
        tensor = layer.get_buffer(name)
        first = tensor.reshape(-1)[0].item()
        tensor.view(-1)[0] = first + 1
        assert live_digest(base.model) != before, name
        tensor.view(-1)[0] = first
        assert live_digest(base.model) == before


def test_casting_the_model_leaves_the_codes_and_scales(directory: Path) -> None:
    base = load_base(directory, quant="nf4")
    layer = base.model.model.layers[0].mlp.up_proj
    before = {name: tensor.clone() for name, tensor in layer.nf4.tensors().items()}
    base.model.to(torch.bfloat16)
    assert base.model.lm_head.weight.dtype is torch.bfloat16
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.nf4.tensors().items())
    assert logits(base.model).dtype is torch.bfloat16


def test_gradients_flow_through_a_layer_and_not_into_it() -> None:
    torch.manual_seed(0)
    layer = Nf4Linear(64, 48, torch.nn.Parameter(torch.randn(48), requires_grad=False))
    with pytest.raises(InternalError):
        _ = layer.nf4
    layer.fill(quantise(torch.randn(48, 64)))
    x = torch.randn(2, 3, 64, requires_grad=True)
    y = layer(x)
    dense = layer.dense()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, dense, layer.bias))
    g = torch.randn_like(y)
    y.backward(g)
    torch.testing.assert_close(x.grad, g @ dense)
    torch.testing.assert_close(layer.matmul_t(g), g @ dense)
    assert all(not tensor.requires_grad for tensor in [*layer.parameters(), *layer.buffers()])
    with pytest.raises(InternalError, match="a 4-bit weight"):
        layer.fill(quantise(torch.randn(64, 48)))


def test_a_gguf_is_quantised_after_it_is_read(tmp_path: Path) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("tiny_gguf", Path(__file__).with_name("test_gguf.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    file = module.tiny_gguf(tmp_path / "tiny.gguf")
    dense, base = load_base(file), load_base(file, quant="nf4", dtype="bfloat16")
    assert base.fingerprint().source == dense.fingerprint().source
    assert base.fingerprint().form == "nf4"
    layer = base.model.model.layers[1].mlp.down_proj
    wanted = dense.model.model.layers[1].mlp.down_proj.weight.to(torch.bfloat16)
    assert same(layer.nf4, quantise(wanted))
    assert len(list(nf4_layers(base.model))) == 14


def test_quantised_layers_take_at_most_027_of_bf16(make_directory: Make) -> None:
    base = load_base(make_directory(hidden_size=256, intermediate_size=512), quant="nf4")
    size = quantised_bytes(base.model)
    weights = [layer.in_features * layer.out_features for _, layer in nf4_layers(base.model)]
    assert size.layers == 14
    assert size.bf16 == 2 * sum(weights)
    assert size.nf4 >= sum(weights) / 2 + sum(weights) / 64
    assert size.share <= 0.27
    assert quantised_bytes(dequantised(base.model)).nf4 == 0


PEAK = """
import gc, sys, threading, time
import torch
import transformers
import postil.base.load, postil.base.nf4_loader
from pathlib import Path
from postil.base import load_base
from postil.base.nf4_loader import load_nf4
from postil.base.stored import stored_tensors

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

torch.set_num_threads(1)
load_base(sys.argv[1], quant="nf4")  # what is imported and cached on first use
gc.collect()
start, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
place = Path(sys.argv[2])  # the weights alone: a tokenizer is no part of a base's size
model, _ = load_nf4(place, stored_tensors(place), torch.bfloat16, trust_remote_code=False)
done.set()
thread.join()
held = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
print(peak - start, sum(held.values()))
"""


def loading_peak(first: Path, directory: Path) -> tuple[int, int]:
    """(peak of anonymous memory above the process while loading, what the loaded base holds), in bytes."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAK, str(first), str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    peak, held = done.stdout.split()
    return int(peak), int(held)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the anonymous memory from /proc")
def test_loading_holds_the_4_bit_base_and_one_layer_at_most(make_directory: Make) -> None:
    small = make_directory("small", dtype=torch.bfloat16)
    directory = make_directory(
        dtype=torch.bfloat16, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    layer = 2 * (4 * 768 * 768 + 3 * 768 * 2048)  # bytes of a decoder layer as stored, 14 MB
    peak, held = loading_peak(small, directory)
    assert held < 0.3 * 8 * layer
    assert 0.8 * held < peak <= held + layer


@pytest.mark.base
def test_the_known_base_in_4_bits() -> None:
    base = load_base("smollm2-135m-instruct", quant="nf4")
    size = quantised_bytes(base.model)
    assert size.layers == 210
    assert size.share <= 0.27
    assert base.fingerprint().source == load_base("smollm2-135m-instruct").fingerprint().source


@pytest.mark.base
@pytest.mark.skipif(sys.platform != "linux", reason="reads the anonymous memory from /proc")
def test_the_known_base_loads_within_its_4_bit_size_and_one_layer() -> None:
    from postil.base import fetch

    directory = fetch("smollm2-135m-instruct")
    layer = 2 * (576 * 576 * 2 + 192 * 576 * 2 + 3 * 576 * 1536)
    peak, held = loading_peak(directory, directory)  # a tokenizer of 49,152 entries is there before
    assert peak <= held + layer
