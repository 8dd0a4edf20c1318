"""The NF4 codec by itself: vectors written out by hand, the fast form against the plain one bit for bit, products."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from postil.errors import BaseModelError, InternalError
from postil.kernels.nf4 import Nf4Weight, codes, dequantise, dequantise_rows, matmul, matmul_t, op, quantise
from postil.kernels.nf4.codes import NF4, nf4_midpoints, nf4_pairs, scale_bins, scale_codes
from postil.kernels.nf4.reference import (
    dequantise_reference,
    dequantise_rows_reference,
    matmul_reference,
    matmul_t_reference,
    quantise_reference,
)

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# aligned; blocks that straddle rows; odd; one value; more than 256 blocks, ragged in both kinds of block
SHAPES = [(3, 64), (40, 192), (7, 96), (5, 33), (1, 1), (130, 129), (2, 64 * 130)]
EVERY_CODE = bytes.fromhex("0123456789abcdef")


def random(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)).to(dtype)


def same(a: Nf4Weight, b: Nf4Weight) -> bool:
    """Whether two weights have the same bits and facts."""
    mine, other = a.tensors(), b.tensors()
    facts = ("shape", "dtype", "blocksize", "nested_blocksize")
    return (
        mine.keys() == other.keys()
        and all(torch.equal(mine[name], other[name]) and mine[name].dtype == other[name].dtype for name in mine)
        and all(getattr(a, fact) == getattr(b, fact) for fact in facts)
    )


@contextmanager
def tiles(values: int, threads: int = 1) -> Iterator[None]:
    """Tiles of so many values, and so many threads (one thread looks codes up by another op than several)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "TILE_VALUES", values)
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(1)


def test_every_code_by_hand() -> None:
    weight = torch.tensor(NF4).mul(2).repeat(4).view(2, 32)  # one block that straddles both rows
    w = quantise(weight, double=False)
    assert bytes(w.packed.flatten().tolist()) == EVERY_CODE * 4
    assert w.packed.shape == (32, 1)
    assert w.packed.dtype == torch.uint8
    assert w.absmax.tolist() == [2.0]
    assert (w.shape, w.dtype, w.blocksize, w.nested) == ((2, 32), torch.float32, 64, False)
    assert torch.equal(dequantise(w), weight)


def test_ties_go_to_the_lower_code() -> None:
    middle = nf4_midpoints(CPU)
    weight = torch.cat([torch.ones(1), middle, torch.nextafter(middle, torch.tensor(2.0)), torch.zeros(33)])
    w = quantise(weight[None], double=False)
    nibbles = torch.stack([w.packed >> 4, w.packed & 15], dim=2).flatten()
    assert nibbles.tolist() == [15, *range(15), *range(1, 16), *[7] * 33]


def test_a_ragged_odd_block_by_hand() -> None:
    w = quantise(torch.tensor([[1.0, -1.0, 0.5]]), double=False)
    assert w.packed.flatten().tolist() == [0xF0, 0xC7]  # 1, -1, 0.4407…, and the code of zero to fill up
    assert w.absmax.tolist() == [1.0]
    assert dequantise(w).tolist() == [[1.0, -1.0, NF4[12]]]


def test_zeros_by_hand() -> None:
    w = quantise(torch.zeros(1, 70), double=False)
    assert w.packed.flatten().tolist() == [0x77] * 35
    assert w.absmax.tolist() == [0.0, float(torch.tensor(1e-38))]  # the ragged block stores the floor
    assert torch.equal(dequantise(w), torch.zeros(1, 70))


def test_double_quantisation_by_hand() -> None:
    weight = torch.ones(2, 64)
    weight[1] = 3.0
    w = quantise(weight)
    assert w.offset is not None
    assert w.nested_absmax is not None
    assert (w.offset.item(), w.nested_absmax.tolist()) == (2.0, [1.0])  # scales 1 and 3: -1 and 1 less the mean
    assert w.absmax.tolist() == [0, 255]
    assert (w.absmax.dtype, w.offset.ndim, w.nested) == (torch.uint8, 0, True)
    lowest = 2.0 - 0.99296875  # the map has no -1
    assert torch.allclose(dequantise(w), torch.tensor([[lowest], [3.0]]).expand(2, 64), rtol=1e-7)


def test_a_constant_weight_comes_back_whole() -> None:
    weight = torch.full((40, 64), -0.3)
    w = quantise(weight)
    assert w.nested_absmax is not None
    assert (w.absmax.unique().tolist(), w.nested_absmax.tolist()) == ([0], [0.0])  # all scales equal their mean
    assert torch.equal(dequantise(w), weight)


def test_the_map_of_the_scales() -> None:
    table = scale_codes(CPU)
    assert table.shape == (256,)
    assert (table[1:] > table[:-1]).all()
    assert torch.equal(table[:127], -table[128:255].flip(0))
    assert (table[127].item(), table[255].item()) == (0.0, 1.0)
    assert table[254].item() == pytest.approx(1 - 0.9 / 128)
    assert table[128].item() == pytest.approx(5.5e-7)
    assert torch.equal(scale_bins(CPU)[[0, 65535]], torch.tensor([0, 255], dtype=torch.uint8))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    blocksize=st.sampled_from((32, 64, 4096)),
    double=st.booleans(),
    scale=st.sampled_from((1.0, 1e-39, 1e-44, 1e30)),
    seed=st.integers(0, 1000),
)
def test_the_fast_form_is_the_plain_one_bit_for_bit(
    shape: tuple[int, int], dtype: torch.dtype, blocksize: int, double: bool, scale: float, seed: int
) -> None:
    weight = random(shape, seed=seed).mul(scale).clamp(-6e4, 6e4).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "QUANTISE_VALUES", 2 * 4096)
        w = quantise(weight, blocksize=blocksize, double=double)
    plain = quantise_reference(weight, blocksize=blocksize, double=double)
    assert same(w, plain)
    start, end = shape[0] // 3, shape[0] // 2 + 1
    for wanted in (None, *DTYPES):
        whole = dequantise_reference(w, wanted)
        for values, threads in ((64, 1), (1000, 2), (2**18, 1), (2**18, 2)):
            with tiles(values, threads):
                assert torch.equal(dequantise(w, wanted), whole)
                rows = dequantise_rows(w, start, end, wanted)
        assert torch.equal(rows, dequantise_rows_reference(w, start, end, wanted))
        assert rows.dtype == (wanted or dtype)


@settings(max_examples=40, deadline=None)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 1000))
def test_values_are_the_nearest_codes_and_come_back_to_themselves(shape: tuple[int, int], seed: int) -> None:
    weight = random(shape, seed=seed)
    once = quantise(weight, double=False)
    back = dequantise(once)
    bound = once.absmax.repeat_interleave(64)[: weight.numel()].view(shape)
    assert ((back - weight).abs() <= bound * (0.5 * (NF4[1] - NF4[0]) + 1e-6)).all()
    assert same(quantise(back, double=False), once)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("values", [64, 3000, 2**18])
def test_products_of_tiles_are_products_of_the_whole(shape: tuple[int, int], values: int) -> None:
    w = quantise(random(shape))
    x, g = random((6, shape[1]), seed=1), random((6, shape[0]), seed=2)
    bias = random((1, shape[0]), seed=3)[0]
    with tiles(values):
        exact = torch.float64
        assert torch.allclose(matmul(x.to(exact), w), matmul_reference(x.to(exact), w), rtol=1e-12, atol=1e-12)
        assert torch.allclose(matmul_t(g.to(exact), w), matmul_t_reference(g.to(exact), w), rtol=1e-12, atol=1e-12)
        for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)):
            for found, wanted in (
                (matmul(x.to(dtype), w), matmul_reference(x.to(dtype), w)),
                (matmul(x.to(dtype), w, bias.to(dtype)), matmul_reference(x.to(dtype), w, bias.to(dtype))),
                (matmul_t(g.to(dtype), w), matmul_t_reference(g.to(dtype), w)),
            ):
                assert found.dtype == dtype
                assert (found - wanted).abs().max() <= bound * wanted.abs().max()


def test_tiles_are_never_a_few_rows_high() -> None:
    w = quantise(random((40, 2048)))
    with tiles(2**10), patch.object(torch, "mm", wraps=torch.mm) as products:
        matmul(random((5, 2048), seed=1), w)
    assert [call.args[1].shape[1] for call in products.call_args_list] == [16, 16, 8]


def test_tiles_cost_no_accuracy_in_bfloat16() -> None:
    w = quantise(random((512, 128)))
    g = random((64, 512), torch.bfloat16, 1)
    exact = g.double() @ dequantise(w, torch.bfloat16).double()
    with tiles(2**12):
        error = (matmul_t(g, w).double() - exact).abs().mean()
    assert error <= 1.05 * (matmul_t_reference(g, w).double() - exact).abs().mean()


@pytest.mark.parametrize("shape", [(9, 128), (6, 40)])
def test_gradients(shape: tuple[int, int]) -> None:
    w = quantise(random(shape))
    x = random((4, shape[1]), torch.float64, 1).requires_grad_()
    g = random((4, shape[0]), torch.float64, 2)
    bias = random((1, shape[0]), torch.float64, 3)[0].requires_grad_()
    with tiles(128):
        assert torch.autograd.gradcheck(lambda x, bias: matmul(x, w, bias), (x, bias))
        (dx,) = torch.autograd.grad(matmul(x, w), x, g)
        assert torch.equal(dx, matmul_t(g, w))


def test_no_rows() -> None:
    for shape in ((9, 128), (6, 40)):
        w = quantise(random(shape))
        for dtype in DTYPES:
            assert matmul(torch.empty(0, shape[1], dtype=dtype), w).shape == (0, shape[0])
            assert matmul(torch.empty(0, shape[1], dtype=dtype), w, torch.ones(shape[0], dtype=dtype)).shape[0] == 0
            assert matmul_t(torch.empty(0, shape[0], dtype=dtype), w).shape == (0, shape[1])
        assert dequantise_rows(w, 2, 2).shape == (0, shape[1])


class Largest(TorchDispatchMode):
    """The bytes of the largest memory that any op returned."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device == CPU:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


def test_the_whole_matrix_is_never_held_and_nothing_is_kept_for_the_backward() -> None:
    w = quantise(random((512, 512), torch.bfloat16))
    x = random((2, 512), torch.bfloat16, 1).requires_grad_()
    kept: list[torch.Tensor] = []
    with tiles(2**13), Largest() as largest, torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: None):
        y = matmul(x, w)
    assert not kept
    with tiles(2**13), Largest() as backward:
        y.backward(torch.ones_like(y))
    codes_alone = w.packed.nbytes
    assert max(largest.bytes, backward.bytes) <= codes_alone < 512 * 512 * 2
    with tiles(2**18), Largest() as control:
        matmul(x, w)
    assert control.bytes > codes_alone


def test_resident_bytes() -> None:
    w = quantise(random((512, 1024), torch.bfloat16))
    assert w.nbytes == 512 * 1024 // 2 + 8192 + 32 * 4 + 4 + 256 * 4
    assert w.nbytes <= 0.27 * 512 * 1024 * 2
    assert same(w.to("cpu"), w)
    assert not same(dataclasses.replace(w, absmax=w.absmax + 1), w)


def test_tables_made_in_odd_places_serve_everywhere() -> None:
    tables = [value for value in vars(codes).values() if hasattr(value, "cache_clear")]
    weight = random((3, 64))
    wanted = quantise_reference(weight)
    for place in (torch.inference_mode(), torch.device("meta")):
        for table in tables:
            table.cache_clear()
        with place:
            w = quantise(weight)
            dequantise(w)
        assert same(w, wanted)
        assert not any(table(CPU).is_inference() for table in tables)
    assert nf4_pairs(CPU).device == CPU


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(float("nan"), torch.float32), (float("inf"), torch.bfloat16), (-float("inf"), torch.float16)],
)
@pytest.mark.parametrize("shape", [(3, 64), (3, 30)])
def test_values_that_are_not_finite_are_refused(value: float, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = random(shape, dtype)
    weight[2, 5] = value
    with pytest.raises(BaseModelError, match=rf"layer\.weight holds {value} at row 2, column 5: NF4 has no code"):
        quantise(weight, name="layer.weight")


@pytest.mark.parametrize(
    ("weight", "blocksize", "message"),
    [
        (torch.ones(2, 64, dtype=torch.int64), 64, "is of dtype torch.int64: .* float32, bfloat16, float16"),
        (torch.ones(64), 64, r"has shape \[64\]"),
        (torch.ones(0, 64), 64, r"has shape \[0, 64\]"),
        (torch.ones(2, 64), 48, "a blocksize of 48 is none of 32, 64"),
        (torch.full((2, 64), 3e38), 64, "mean of its block scales overflows"),
    ],
)
def test_what_cannot_be_quantised(weight: torch.Tensor, blocksize: int, message: str) -> None:
    with pytest.raises(BaseModelError, match=message):
        quantise(weight, blocksize=blocksize)


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (2, 1), (0, 4)])
def test_rows_that_are_not_there(start: int, end: int) -> None:
    with pytest.raises(InternalError, match="of a weight of 3 rows"):
        dequantise_rows(quantise(torch.ones(3, 64)), start, end)
