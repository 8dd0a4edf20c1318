"""cross_entropy in chunks against all logits at once: values and every gradient."""

from __future__ import annotations

import math

import pytest
import torch

from postil.kernels.loss import cross_entropy
from postil.kernels.loss.chunks import CHUNK_ROWS
from postil.kernels.loss.reference import cross_entropy_reference

D, VOCABULARY = 6, 11


class Problem:
    """Random inputs and a head with a weight and a bias that both want a gradient."""

    def __init__(self, rows: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(rows)
        self.hidden = torch.randn(rows, D, generator=generator).to(dtype).requires_grad_()
        self.targets = torch.randint(VOCABULARY, (rows,), generator=generator)
        self.weights = torch.rand(rows, generator=generator) / max(rows, 1)
        self.weight = torch.randn(VOCABULARY, D, generator=generator).to(dtype).requires_grad_()
        self.bias = torch.randn(VOCABULARY, generator=generator).to(dtype).requires_grad_()
        self.calls: list[tuple[int, int, bool]] = []

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hidden, self.targets, self.weights

    def head(self, rows: torch.Tensor, start: int, end: int) -> torch.Tensor:
        assert rows.shape[0] == end - start
        self.calls.append((start, end, torch.is_grad_enabled()))
        return rows @ self.weight.T + self.bias

    def gradients(self, total: torch.Tensor) -> list[torch.Tensor]:
        inputs = [self.hidden, self.weight, self.bias]
        grads = torch.autograd.grad(3.0 * total, inputs, allow_unused=True)
        return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 600])
def test_equals_the_reference(rows: int, dtype: torch.dtype) -> None:
    problem = Problem(rows, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    total, nll = cross_entropy(*problem.arguments, problem.head, [problem.weight, problem.bias])
    expected, expected_nll = cross_entropy_reference(*problem.arguments, problem.head)
    assert total.dtype == nll.dtype == torch.float32
    assert total.shape == ()
    assert not nll.requires_grad
    torch.testing.assert_close(total, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(nll, expected_nll, rtol=tolerance, atol=tolerance)
    for got, want in zip(problem.gradients(total), problem.gradients(expected), strict=True):
        assert got.dtype == dtype
        size = max(want.abs().max().item(), 1e-3) if want.numel() else 1.0
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * size)


def test_the_head_sees_every_row_once_and_no_more_than_a_chunk() -> None:
    problem = Problem(600)
    cross_entropy(*problem.arguments, problem.head, [problem.weight, problem.bias])
    assert problem.calls == [(0, 256, True), (256, 512, True), (512, 600, True)]


def test_no_gradient_work_under_no_grad() -> None:
    problem = Problem(300)
    with torch.no_grad():
        total, nll = cross_entropy(*problem.arguments, problem.head, [problem.weight, problem.bias])
    expected, expected_nll = cross_entropy_reference(*problem.arguments, problem.head)
    assert not total.requires_grad
    torch.testing.assert_close(total, expected.detach())
    torch.testing.assert_close(nll, expected_nll)
    assert [grad for _, _, grad in problem.calls[:2]] == [False, False]


def test_no_gradient_work_where_nothing_wants_one() -> None:
    problem = Problem(300)
    total, _ = cross_entropy(problem.hidden.detach(), problem.targets, problem.weights, problem.head)
    assert not total.requires_grad
    assert not any(grad for _, _, grad in problem.calls)


def test_parameters_alone_may_want_a_gradient() -> None:
    problem = Problem(300)
    inputs = problem.hidden.detach(), problem.targets, problem.weights
    total, _ = cross_entropy(*inputs, problem.head, [problem.weight])
    expected, _ = cross_entropy_reference(*inputs, problem.head)
    (got,), (want,) = torch.autograd.grad(total, problem.weight), torch.autograd.grad(expected, problem.weight)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_weight_zero_takes_a_row_out() -> None:
    problem = Problem(5)
    problem.weights = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0])
    total, nll = cross_entropy(*problem.arguments, problem.head, [problem.weight, problem.bias])
    torch.testing.assert_close(total.detach(), nll[0] + 0.5 * nll[2])
    (grad,) = torch.autograd.grad(total, problem.hidden)
    assert torch.equal(grad[[1, 3, 4]], torch.zeros(3, D))
    assert (grad[[0, 2]] != 0).any(1).all()


def test_equal_logits_cost_the_log_of_the_vocabulary() -> None:
    hidden, targets = torch.zeros(3, D), torch.tensor([0, 4, 10])
    _, nll = cross_entropy(hidden, targets, torch.ones(3), lambda rows, _s, _e: rows.new_zeros(len(rows), VOCABULARY))
    torch.testing.assert_close(nll, torch.full((3,), math.log(VOCABULARY)))
