"""A 4-bit weight as tensors: it comes back bit for bit, and whatever does not hold together is refused by its key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from postil.base.nf4_files import from_tensors, to_tensors
from postil.errors import BaseModelError
from postil.kernels.nf4 import Nf4Weight, quantise

NAME = "layers.0.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
Tensors = dict[str, torch.Tensor]


def weight(shape: tuple[int, int] = (6, 64), double: bool = True, **options: Any) -> Nf4Weight:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return quantise(dense.bfloat16(), double=double, **options)


def state_of(tensors: Tensors) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(bytes(tensors[STATE].tolist()))
    return state


def packed_json(state: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(6, 64), (5, 33), (1, 3), (64, 64 * 5)])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("blocksize", [32, 64])
def test_a_weight_comes_back_from_a_file(
    shape: tuple[int, int], double: bool, blocksize: int, tmp_path: Path
) -> None:
    w = weight(shape, double, blocksize=blocksize)
    others = {"layers.0.up_proj.bias": torch.ones(1), f"{NAME}s.absmax": torch.ones(1), "head.weight": torch.ones(1)}
    save_file(to_tensors(NAME, w) | others, tmp_path / "w.safetensors")
    back = from_tensors(NAME, load_file(tmp_path / "w.safetensors"))
    assert (back.shape, back.dtype, back.blocksize, back.nested) == (shape, torch.bfloat16, blocksize, double)
    assert back.nested_blocksize == w.nested_blocksize
    mine, other = w.tensors(), back.tensors()
    assert mine.keys() == other.keys()
    assert all(
        torch.equal(other[name], tensor) and other[name].dtype == tensor.dtype for name, tensor in mine.items()
    )


def test_the_keys_and_the_state_by_hand() -> None:
    tensors = to_tensors(NAME, weight())
    ends = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4")
    assert set(tensors) == {NAME + end for end in ends}
    state = state_of(tensors)
    assert list(state) == [
        "quant_type", "blocksize", "dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset",
    ]  # fmt: skip
    assert state["nested_offset"] == weight().offset
    assert (state["dtype"], state["shape"], state["nested_dtype"]) == ("bfloat16", [6, 64], "float32")
    assert set(to_tensors(NAME, weight(double=False))) == {NAME + end for end in ends if "nested" not in end}


def test_no_two_weights_share_memory() -> None:
    one, two = to_tensors("a", weight()), to_tensors("b", weight())
    pointers = [tensor.data_ptr() for tensor in (*one.values(), *two.values())]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_codes_stored_as_another_dtype(dtype: torch.dtype) -> None:
    w = weight()
    tensors = to_tensors(NAME, w, quant_storage=dtype)
    assert tensors[NAME].dtype == dtype
    assert tensors[NAME].shape == (192 // dtype.itemsize, 1)
    assert torch.equal(from_tensors(NAME, tensors).packed, w.packed)


def test_codes_that_do_not_fill_the_other_dtype() -> None:
    with pytest.raises(BaseModelError, match=r"up_proj\.weight has 83 bytes of codes, .* torch.float32: use uint8"):
        to_tensors(NAME, weight((5, 33)), quant_storage=torch.float32)


def without(end: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(NAME + end)


def put(end: str, tensor: torch.Tensor) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({NAME + end: tensor})


def state(**fields: Any) -> Callable[[Tensors], Any]:
    """Change fields of the state; one that is None goes."""

    def change(tensors: Tensors) -> None:
        changed = state_of(tensors) | fields
        tensors[STATE] = packed_json({key: value for key, value in changed.items() if value is not None})

    return change


BROKEN: list[tuple[str, Callable[[Tensors], Any], str]] = [
    ("no codes", without(""), r"^layers\.0\.up_proj\.weight is missing"),
    ("no state", without(".quant_state.bitsandbytes__nf4"), r"weight\.quant_state\.bitsandbytes__nf4 is missing"),
    ("no scales", without(".absmax"), r"weight\.absmax of a weight stored in nf4 is missing"),
    ("no map", without(".quant_map"), r"weight\.quant_map of a weight"),
    ("half nested", without(".nested_absmax"), r"weight\.nested_absmax of a weight"),
    ("half nested too", without(".nested_quant_map"), r"weight\.nested_quant_map of a weight"),
    ("unknown key", put(".nested_absmx", torch.ones(1)), r"nested_absmx is no part .*mean '.*\.nested_absmax'"),
    ("fp4", put(".quant_state.bitsandbytes__fp4", torch.ones(1)), "is stored in fp4.* nf4 only"),
    ("scales of another dtype", put(".absmax", torch.ones(6)), r"absmax is torch\.float32 \[6\].*wants torch\.uint8"),
    ("too few scales", put(".absmax", torch.ones(5, dtype=torch.uint8)), r"absmax is torch\.uint8 \[5\].*\[6\]"),
    ("too many nested", put(".nested_absmax", torch.ones(2)), r"nested_absmax is .*\[2\].*\[1\]"),
    ("infinite scales", put(".nested_absmax", torch.tensor([torch.inf])), "nested_absmax holds values .* not finite"),
    ("another map", put(".quant_map", torch.linspace(-1, 1, 16)), "quant_map holds other values than NF4's"),
    ("short map", put(".nested_quant_map", torch.ones(255)), r"nested_quant_map is .*\[255\]"),
    ("too few codes", put("", torch.ones(191, 1, dtype=torch.uint8)), "holds 191 bytes, not 192 bytes"),
    ("codes as a matrix", put("", torch.ones(6, 32, dtype=torch.uint8)), r"has shape \[6, 32\], where \[n, 1\]"),
    ("state of floats", put(".quant_state.bitsandbytes__nf4", torch.ones(4) / 3), "nf4 holds no JSON"),
    ("state of rubbish", put(".quant_state.bitsandbytes__nf4", torch.tensor([255, 1])), "nf4 holds no JSON"),
    ("state is a list", put(".quant_state.bitsandbytes__nf4", packed_json([1])), "holds no JSON object"),
    ("state lacks a field", state(blocksize=None), "nf4 lacks blocksize"),
    ("state half nested", state(nested_offset=None), "nf4 lacks nested_offset"),
    ("state has more", state(colour="red"), "nf4 has colour, which is not known"),
    ("another kind", state(quant_type="fp4"), "has quant_type 'fp4'"),
    ("another block", state(blocksize=63), "has blocksize 63"),
    ("block of another type", state(blocksize=64.0), r"has blocksize 64\.0"),
    ("another dtype", state(dtype="float64"), "has dtype 'float64'"),
    ("dtype of another type", state(dtype=[1]), r"has dtype \[1\]"),
    ("a vector", state(shape=[384]), r"has shape \[384\]"),
    ("an empty matrix", state(shape=[0, 64]), r"has shape \[0, 64\]"),
    ("another shape", state(shape=[6, 128]), "holds 192 bytes, not 384 bytes of codes"),
    ("no nested blocks", state(nested_blocksize=0), "has nested_blocksize 0"),
    ("nested in half", state(nested_dtype="float16"), "has nested_dtype 'float16'"),
    ("no offset", state(nested_offset=float("nan")), "has nested_offset nan"),
    ("offset of another type", state(nested_offset="1"), "has nested_offset '1'"),
    ("state not nested", state(nested_offset=None, nested_dtype=None, nested_blocksize=None), "nothing of nested"),
]  # fmt: skip


@pytest.mark.parametrize(("breaks", "message"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_what_does_not_hold_together_is_refused_by_its_key(breaks: Callable[[Tensors], Any], message: str) -> None:
    tensors = to_tensors(NAME, weight())
    breaks(tensors)
    with pytest.raises(BaseModelError, match=message):
        from_tensors(NAME, tensors)


def test_a_nested_state_without_nested_tensors() -> None:
    tensors = to_tensors(NAME, weight(double=False))
    tensors[STATE] = to_tensors(NAME, weight())[STATE]
    with pytest.raises(BaseModelError, match=r"absmax is torch\.float32.* wants torch\.uint8"):
        from_tensors(NAME, tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({NAME: torch.ones(6, 64, dtype=torch.int8)}, "int8, which postil does not read"),
        ({NAME: torch.ones(6, 64), "layers.0.up_proj.SCB": torch.ones(6)}, "int8, which postil does not read"),
        ({NAME: torch.ones(6, 64)}, "without it layers.0.up_proj.weight is no 4-bit weight"),
        ({"layers.1.up_proj.weight": torch.ones(1)}, "did you mean 'layers.1.up_proj.weight'"),
    ],
)
def test_a_weight_that_is_not_in_4_bits(tensors: Tensors, message: str) -> None:
    with pytest.raises(BaseModelError, match=message):
        from_tensors(NAME, tensors)
