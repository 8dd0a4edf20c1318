"""NF4 against bitsandbytes on a CPU: codes, scales, values and serialised states bit for bit, both ways."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from postil.base import load_base, nf4_layers
from postil.base.nf4_directory import quantise_directory
from postil.base.nf4_files import from_tensors, to_tensors
from postil.errors import BaseModelError
from postil.kernels.nf4 import Nf4Weight, dequantise, matmul, matmul_t, quantise
from postil.kernels.nf4.codes import nf4_midpoints, scale_codes
from postil.kernels.nf4.op import BLOCKSIZES

bitsandbytes = pytest.importorskip("bitsandbytes")
theirs = bitsandbytes.functional

NAME = "model.layers.0.mlp.up_proj.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIMIT = {torch.float32: 3.4e38, torch.bfloat16: 3.3e38, torch.float16: 65504.0}
# whole blocks; blocks that straddle rows; odd; below one block; more than 256 blocks, whole and ragged in both
SHAPES = [(4, 64), (576, 192), (3, 96), (5, 33), (2, 3), (1, 70), (256, 64), (130, 129), (257, 65), (300, 64)]
KINDS = (
    "random", "heavy tails", "constant", "zero", "some zero blocks", "few values", "denormal", "some denormal",
    "tiny", "huge", "every magnitude", "one sign", "near ties",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def eager() -> Iterator[None]:
    """bitsandbytes compiles its fall-back for odd shapes; interpreted it computes the same, at once."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def source(shape: tuple[int, int], kind: str, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A finite weight of some kind, the same at every call."""
    chance = torch.Generator().manual_seed(seed)
    size = shape[0] * shape[1]
    normal = torch.randn(size, generator=chance, dtype=torch.float64)
    blocks = torch.rand(-(-size // 64), generator=chance, dtype=torch.float64).repeat_interleave(64)[:size]
    values = {
        "random": normal * 0.05,
        "heavy tails": normal**5,
        "constant": torch.full_like(normal, float(normal[0])),
        "zero": torch.zeros_like(normal),
        "some zero blocks": normal * (blocks > 0.5),
        "few values": (normal * 2).round() / 4,
        "denormal": normal * 1e-40,
        "some denormal": normal * torch.where(blocks > 0.5, 1e-39, 1e-44),
        "tiny": normal * 1e-37,
        "huge": normal * 1e37 * (1 + 20 * (blocks > 0.9)),
        "every magnitude": normal * 10 ** (blocks * 76 - 44),
        "one sign": -normal.abs(),
        "near ties": torch.where(torch.arange(size) % 64 == 0, 1.0, near_ties(normal)) * (blocks + 0.1),
    }[kind]
    limit = LIMIT[dtype]
    return values.clamp(-limit, limit).view(shape).to(dtype)


def near_ties(normal: torch.Tensor) -> torch.Tensor:
    """Midpoints of codes within a few parts in 2^24: a product rounds there as a quotient does not."""
    middles = nf4_midpoints(torch.device("cpu")).double()
    return middles[(normal.abs() * 1e6).long() % 15] * (1 + (normal * 2).round() * 2**-24)


def quantised(weight: torch.Tensor, blocksize: int, double: bool) -> tuple[torch.Tensor, Any]:
    """Their (codes, state)."""
    packed, state = theirs.quantize_4bit(weight, blocksize=blocksize, compress_statistics=double, quant_type="nf4")
    return packed, state


def dequantised(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """Their values, asked for as one row: with AVX-512 they read the wrong scale where a block straddles rows."""
    shape = state.shape
    row = theirs.QuantState(
        state.absmax, torch.Size((1, shape.numel())), state.code, state.blocksize, "nf4", dtype, state.offset,
        state.state2,
    )  # fmt: skip
    values: torch.Tensor = theirs.dequantize_4bit(packed, row)
    return values.flatten().view(shape)


def check_values(w: Nf4Weight, packed: torch.Tensor, state: Any, dtype: torch.dtype) -> None:
    """Assert that our values in `dtype` are theirs, bit for bit.

    One exception: on a processor with AVX512-BF16 theirs become zero in bfloat16 where they are below its smallest
    normal number, on others they do not; ours never do.
    """
    found, wanted = dequantise(w, dtype), dequantised(packed, state, dtype)
    assert found.dtype == wanted.dtype == dtype
    if dtype == torch.bfloat16:
        small = dequantised(packed, state, torch.float32).abs() < torch.finfo(dtype).smallest_normal
        assert torch.equal(found, dequantise(w, torch.float32).bfloat16())
        found = found.where(~small | (wanted != 0), 0.0)
    assert torch.equal(found, wanted)


def check_same(w: Nf4Weight, packed: torch.Tensor, state: Any) -> None:
    """Assert that codes, scales and the facts are theirs, bit for bit."""
    pairs = [(w.packed, packed), (w.absmax, state.absmax)]
    if state.nested:
        pairs += [
            (w.nested_absmax, state.state2.absmax), (w.offset, state.offset), (w.nested_quant_map, state.state2.code)
        ]  # fmt: skip
        assert w.nested_blocksize == state.state2.blocksize
    assert w.nested == state.nested
    assert (w.shape, w.dtype, w.blocksize) == (tuple(state.shape), state.dtype, state.blocksize)
    for mine, other in pairs:
        assert mine is not None
        assert mine.dtype == other.dtype
        assert mine.shape == other.shape
        assert torch.equal(mine.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


@settings(max_examples=250, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from((64, 64, *BLOCKSIZES)),
    double=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_codes_scales_and_values_are_theirs(
    shape: tuple[int, int], kind: str, dtype: torch.dtype, blocksize: int, double: bool, seed: int
) -> None:
    weight = source(shape, kind, dtype, seed)
    packed, state = quantised(weight, blocksize, double)
    if double and not state.offset.isfinite():  # their scales are not numbers then
        with pytest.raises(BaseModelError, match="overflows"):
            quantise(weight, blocksize=blocksize)
        return
    w = quantise(weight, blocksize=blocksize, double=double)
    check_same(w, packed, state)
    for wanted in DTYPES:
        check_values(w, packed, state, wanted)
    if shape[1] % blocksize == 0:  # as they are asked by a layer
        whole = theirs.dequantize_4bit(packed, state)
        assert torch.equal(whole, dequantised(packed, state, dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_in_a_large_ragged_weight(kind: str, dtype: torch.dtype) -> None:
    weight = source((1031, 517), kind, dtype, 3)  # beyond 32 nested blocks, every block and byte ragged
    double = kind not in ("huge", "every magnitude")
    w = quantise(weight, double=double)
    packed, state = quantised(weight, 64, double)
    check_same(w, packed, state)
    check_values(w, packed, state, dtype)


def test_the_map_of_the_scales_is_theirs() -> None:
    assert torch.equal(scale_codes(torch.device("cpu")), theirs.create_dynamic_map())


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from((64, 128)),
    double=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_states_both_ways(
    shape: tuple[int, int], dtype: torch.dtype, blocksize: int, double: bool, seed: int
) -> None:
    weight = source(shape, "random", dtype, seed)
    packed, state = quantised(weight, blocksize, double)
    stored = {NAME: packed} | {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    w = quantise(weight, blocksize=blocksize, double=double)
    mine = to_tensors(NAME, w)
    assert mine.keys() == stored.keys()
    for key, tensor in stored.items():  # the JSON too: byte for byte
        assert torch.equal(mine[key], tensor)
        assert mine[key].dtype == tensor.dtype
    check_same(from_tensors(NAME, stored), packed, state)
    read = theirs.QuantState.from_dict(
        {key: value for key, value in mine.items() if key != NAME}, torch.device("cpu")
    )
    check_same(w, mine[NAME], read)
    assert torch.equal(dequantised(mine[NAME], read, dtype), dequantise(w))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.int8])
def test_a_layer_of_theirs_through_a_file_and_back(storage: torch.dtype, tmp_path: Path) -> None:
    weight = source((48, 128), "random", torch.bfloat16, 1)
    layer = bitsandbytes.nn.Linear4bit(
        128, 48, bias=False, compute_dtype=torch.float32, quant_type="nf4", quant_storage=storage
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", quant_storage=storage, compress_statistics=True
    )
    layer = layer.to("cpu")
    file = tmp_path / "theirs.safetensors"
    save_file({f"up.{key}": value for key, value in layer.state_dict().items()}, file)
    w = from_tensors("up.weight", load_file(file))
    check_same(w, *quantised(weight, 64, True))

    mine = tmp_path / "mine.safetensors"
    save_file(to_tensors("weight", w, quant_storage=storage), mine)
    tensors = load_file(mine)
    assert tensors["weight"].dtype == storage
    for key, value in layer.state_dict().items():  # as bytes: codes seen as floats may be no numbers
        assert torch.equal(tensors[key].view(torch.uint8), value.contiguous().view(torch.uint8))
    parameter = bitsandbytes.nn.Params4bit.from_prequantized(tensors.pop("weight"), tensors, device="cpu")
    assert torch.equal(theirs.dequantize_4bit(parameter.data.view(torch.uint8), parameter.quant_state), dequantise(w))


def test_products_and_gradients_are_theirs() -> None:
    weight = source((192, 128), "random", torch.float32, 1)
    packed, state = quantised(weight, 64, True)
    w = quantise(weight)
    x = source((7, 128), "heavy tails", torch.float32, 2).clamp(-3, 3).requires_grad_()
    y = bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)
    g = source((7, 192), "random", torch.float32, 3)
    y.backward(g)
    assert x.grad is not None
    assert torch.allclose(matmul(x, w), y, rtol=1e-5, atol=1e-6)
    assert torch.allclose(matmul_t(g, w), x.grad, rtol=1e-5, atol=1e-6)


def test_not_a_number_is_refused_where_they_go_on() -> None:
    weight = source((3, 64), "random", torch.float32, 1)
    weight[1, 9] = float("nan")
    _, state = quantised(weight, 64, False)
    assert state.absmax[1].isnan()
    with pytest.raises(BaseModelError, match="holds nan at row 1, column 9"):
        quantise(weight)


def test_their_other_kinds_are_refused_by_name() -> None:
    weight = source((4, 64), "random", torch.float16, 1)
    packed, state = theirs.quantize_4bit(weight, quant_type="fp4")
    stored = {NAME: packed} | {f"{NAME}.{key}": value for key, value in state.as_dict(packed=True).items()}
    with pytest.raises(BaseModelError, match=r"up_proj\.weight is stored in fp4"):
        from_tensors(NAME, stored)
    text = bytes(state.as_dict(packed=True)["quant_state.bitsandbytes__fp4"].tolist())
    assert json.loads(text)["quant_type"] == "fp4"
    codes, scales, _ = theirs.int8_vectorwise_quant(weight)
    with pytest.raises(BaseModelError, match=r"up_proj\.weight is stored in bitsandbytes' int8"):
        from_tensors(NAME, {NAME: codes, NAME.replace("weight", "SCB"): scales})


def tiny_base(directory: Path) -> Path:
    """A Llama whose rows are whole blocks, in bfloat16, with a tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w3"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1").save_pretrained(directory)
    return directory


def their_model(directory: Path, **options: Any) -> Any:
    """What transformers makes of a directory with bitsandbytes."""
    return transformers.AutoModelForCausalLM.from_pretrained(directory, device_map="cpu", **options).eval()


def check_models(base: Any, model: Any) -> None:
    """Assert that every 4-bit layer is the same in both, and that both say the same of a text."""
    layers = dict(nf4_layers(base.model))
    others = {
        path: module.weight
        for path, module in model.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    assert layers.keys() == others.keys()
    assert len(layers) == 14
    for path, layer in layers.items():
        check_same(layer.nf4, others[path].data, others[path].quant_state)
    ids = torch.arange(3, 40)[None]
    model.train()  # for reading without a gradient they round the scales to bfloat16 on some processors
    found, wanted = base.model(input_ids=ids).logits, model(input_ids=ids.clone()).logits
    assert (found - wanted).abs().max() <= 2**-6 * wanted.abs().max()


def test_checkpoints_both_ways(tmp_path: Path) -> None:
    dense = tiny_base(tmp_path / "dense")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = their_model(dense, quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    transformers.AutoTokenizer.from_pretrained(dense).save_pretrained(tmp_path / "theirs")
    check_models(load_base(tmp_path / "theirs"), model)  # their checkpoint here

    quantise_directory(dense, tmp_path / "ours")
    check_models(
        load_base(dense, quant="nf4"), their_model(tmp_path / "ours", dtype=torch.bfloat16)
    )  # and ours there
    theirs_stored, ours_stored = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert theirs_stored.keys() == ours_stored.keys()
    assert all(torch.equal(ours_stored[key], tensor) for key, tensor in theirs_stored.items())
