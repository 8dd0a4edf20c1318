"""The dense products: what a CPU without 16-bit instructions computes, beside the plain form, with every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postil.kernels.dense import matmul, matmul_t, op
from postil.kernels.dense.reference import matmul_reference, matmul_t_reference
from postil.kernels.nf4 import op as nf4_op
from postil.kernels.nf4 import quantise
from postil.kernels.nf4.reference import matmul_reference as nf4_reference
from postil.kernels.nf4.reference import matmul_t_reference as nf4_reference_t

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without 16-bit products, whatever this one is, and small tiles and blocks of rows."""
    monkeypatch.setattr(op, "multiplies", lambda dtype: dtype not in HALF)
    monkeypatch.setattr(op, "TILE_VALUES", 100)
    monkeypatch.setattr(op, "BLOCK_ROWS", 10)


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal up to one rounding of the dtype: the order of the float32 sum is the only freedom."""
    assert a.dtype == b.dtype
    step = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-5}[a.dtype]
    torch.testing.assert_close(a, b, rtol=2 * step, atol=1e-5)


@pytest.mark.usefixtures("slow")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    rows=st.sampled_from([(0,), (1,), (15,), (16,), (17,), (1, 33), (2, 0, 3), (3, 11)]),
    d_in=st.sampled_from([1, 7, 64, 130]),
    d_out=st.sampled_from([1, 5, 96]),
    dtype=st.sampled_from([*HALF, torch.float32]),
    biased=st.booleans(),
    turned=st.booleans(),
)
def test_outputs_and_gradients_are_those_of_the_plain_form(
    rows: tuple[int, ...], d_in: int, d_out: int, dtype: torch.dtype, biased: bool, turned: bool
) -> None:
    x, y_grad = (random(*rows, size, dtype=dtype, seed=size) for size in (d_in, d_out))
    weight = random(d_in, d_out, dtype=dtype, seed=3).T if turned else random(d_out, d_in, dtype=dtype, seed=3)
    bias = random(d_out, dtype=dtype, seed=4) if biased else None
    mine, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = matmul(mine, weight, bias), matmul_reference(plain, weight, bias)
    close(y, expected)
    y.backward(y_grad)
    expected.backward(y_grad)
    assert mine.grad is not None
    assert plain.grad is not None
    close(mine.grad, plain.grad)
    close(matmul_t(y_grad, weight), matmul_t_reference(y_grad, weight))


@pytest.mark.usefixtures("slow")
def test_a_trained_weight_gets_its_gradient_from_torch() -> None:
    x, weight = random(32, 8, dtype=torch.bfloat16, seed=0), random(4, 8, dtype=torch.bfloat16, seed=1)
    matmul(x, weight.requires_grad_(), None).sum().backward()
    assert weight.grad is not None
    close(weight.grad, x.float().sum(0).bfloat16().expand(4, 8))


@pytest.mark.usefixtures("slow")
def test_a_weight_written_between_the_passes_is_noticed() -> None:
    x, weight = random(32, 8, dtype=torch.bfloat16, seed=0), random(4, 8, dtype=torch.bfloat16, seed=1)
    y = matmul(x.requires_grad_(), weight)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(40, 192), (7, 96), (5, 33)])
def test_4_bit_products_are_those_of_the_plain_form(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(op, "multiplies", lambda dtype: dtype not in HALF)
    w = quantise(random(*shape, dtype=dtype, seed=0))
    x, g = random(33, shape[1], dtype=dtype, seed=1), random(33, shape[0], dtype=dtype, seed=2)
    bias = random(shape[0], dtype=dtype, seed=3)
    called = []
    monkeypatch.setattr(nf4_op, "widens", lambda rows: called.append(op.widens(rows)) or called[-1])
    for made, plain in (
        (nf4_op.matmul(x, w, bias), nf4_reference(x.float(), w, bias.float())),
        (nf4_op.matmul_t(g, w), nf4_reference_t(g.float(), w)),
    ):
        torch.testing.assert_close(made.float(), plain, rtol=2e-2, atol=5e-2)
    assert called == [True, True]


def test_what_has_no_other_way_stays_with_torch() -> None:
    assert op.multiplies(torch.float32)
    assert op.multiplies(torch.float64)
    assert not op.widens(torch.zeros(0, 8, dtype=torch.bfloat16))
    assert not op.widens(torch.zeros(64, 0, dtype=torch.bfloat16))
    assert op.instructions().startswith(torch.backends.cpu.get_cpu_capability())
