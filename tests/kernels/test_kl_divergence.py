"""kl_divergence in chunks against all logits at once: values and every gradient."""

from __future__ import annotations

import math

import pytest
import torch

from postil.kernels.loss import kl_divergence
from postil.kernels.loss.chunks import CHUNK_ROWS
from postil.kernels.loss.reference import Head, kl_divergence_reference

D_P, D_Q, VOCABULARY = 5, 6, 11


class Problem:
    """Random inputs, a head for each side, and q's head with a weight and a bias that both want a gradient."""

    def __init__(self, rows: int, dtype: torch.dtype = torch.float32, cap: float | None = None) -> None:
        generator = torch.Generator().manual_seed(rows)
        self.hidden_p = torch.randn(rows, D_P, generator=generator).to(dtype)
        self.hidden_q = torch.randn(rows, D_Q, generator=generator).to(dtype).requires_grad_()
        self.weight_p = torch.randn(VOCABULARY, D_P, generator=generator).to(dtype)
        self.weight = torch.randn(VOCABULARY, D_Q, generator=generator).to(dtype).requires_grad_()
        self.bias = torch.randn(VOCABULARY, generator=generator).to(dtype).requires_grad_()
        self.cap = cap
        self.calls: list[tuple[str, int, int, bool]] = []

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, Head, Head]:
        return self.hidden_p, self.hidden_q, self.head_p, self.head_q

    def head_p(self, rows: torch.Tensor, start: int, end: int) -> torch.Tensor:
        assert rows.shape[0] == end - start
        self.calls.append(("p", start, end, torch.is_grad_enabled()))
        return self.capped(rows @ self.weight_p.T)

    def head_q(self, rows: torch.Tensor, start: int, end: int) -> torch.Tensor:
        assert rows.shape[0] == end - start
        self.calls.append(("q", start, end, torch.is_grad_enabled()))
        return self.capped(rows @ self.weight.T + self.bias)

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def gradients(self, total: torch.Tensor) -> list[torch.Tensor]:
        inputs = [self.hidden_q, self.weight, self.bias]
        grads = torch.autograd.grad(3.0 * total, inputs, allow_unused=True)
        return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]


def check(problem: Problem, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    total, kl = kl_divergence(*problem.arguments, [problem.weight, problem.bias])
    expected, expected_kl = kl_divergence_reference(*problem.arguments)
    assert total.dtype == kl.dtype == torch.float32
    assert total.shape == ()
    assert not kl.requires_grad
    torch.testing.assert_close(total, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(kl, expected_kl, rtol=tolerance, atol=tolerance)
    for got, want in zip(problem.gradients(total), problem.gradients(expected), strict=True):
        assert got.dtype == dtype
        size = max(want.abs().max().item(), 1e-3) if want.numel() else 1.0
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7, CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 600])
def test_equals_the_reference(rows: int, dtype: torch.dtype) -> None:
    check(Problem(rows, dtype), dtype)


def test_a_soft_cap_in_the_heads() -> None:
    check(Problem(300, cap=2.0), torch.float32)


def test_the_gradient_is_that_of_the_formula() -> None:
    problem = Problem(5)
    for tensor in (problem.hidden_q, problem.weight, problem.bias):
        tensor.data = tensor.data.double()
    problem.hidden_p, problem.weight_p = problem.hidden_p.double(), problem.weight_p.double()

    def plain(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        p = torch.softmax(problem.hidden_p @ problem.weight_p.T, -1)
        q = torch.softmax(hidden @ weight.T + bias, -1)
        return (p * (p.log() - q.log())).sum()

    inputs = problem.hidden_q, problem.weight, problem.bias
    assert torch.autograd.gradcheck(plain, inputs)
    wanted = torch.autograd.grad(3.0 * plain(*inputs), inputs)
    total, _ = kl_divergence(*problem.arguments, [problem.weight, problem.bias])
    for got, want in zip(problem.gradients(total), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_each_head_sees_every_row_once_and_no_more_than_a_chunk() -> None:
    problem = Problem(600)
    kl_divergence(*problem.arguments, [problem.weight, problem.bias])
    chunks = [(0, 256), (256, 512), (512, 600)]
    assert problem.calls == [(side, *chunk, side == "q") for chunk in chunks for side in "pq"]


def test_no_gradient_work_where_nothing_wants_one() -> None:
    problem = Problem(300)
    with torch.no_grad():
        total, _ = kl_divergence(*problem.arguments, [problem.weight, problem.bias])
    frozen, _ = kl_divergence(problem.hidden_p, problem.hidden_q.detach(), problem.head_p, problem.head_q)
    assert not total.requires_grad
    assert not frozen.requires_grad
    assert not any(grad for *_, grad in problem.calls)


def test_what_q_is_held_to_gets_no_gradient() -> None:
    problem = Problem(9)
    problem.hidden_p.requires_grad_()
    problem.weight_p.requires_grad_()
    total, _ = kl_divergence(*problem.arguments, [problem.weight])
    grads = torch.autograd.grad(total, [problem.hidden_p, problem.weight_p], allow_unused=True)
    assert grads == (None, None)
    with pytest.raises(RuntimeError, match="does not require grad"):
        kl_divergence(problem.hidden_p, problem.hidden_q.detach(), problem.head_p, problem.head_q)[0].backward()


def test_parameters_alone_may_want_a_gradient() -> None:
    problem = Problem(300)
    inputs = problem.hidden_p, problem.hidden_q.detach(), problem.head_p, problem.head_q
    total, _ = kl_divergence(*inputs, [problem.weight])
    expected, _ = kl_divergence_reference(*inputs)
    (got,), (want,) = torch.autograd.grad(total, problem.weight), torch.autograd.grad(expected, problem.weight)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_same_distribution_is_zero_away_and_has_no_slope() -> None:
    hidden = torch.randn(40, D_Q, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(VOCABULARY, D_Q, generator=torch.Generator().manual_seed(1))

    def head(rows: torch.Tensor, _start: int, _end: int) -> torch.Tensor:
        return rows @ weight.T

    def shifted(rows: torch.Tensor, start: int, end: int) -> torch.Tensor:
        return head(rows, start, end) + 7.0  # the same softmax

    total, kl = kl_divergence(hidden, hidden, head, shifted)
    (grad,) = torch.autograd.grad(total, hidden)
    torch.testing.assert_close(kl, torch.zeros(40), rtol=0, atol=2e-6)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=2e-6)


def test_known_values_and_words_that_neither_can_say() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0]])
    q = torch.tensor([[0.25, 0.25, 0.5, 0.0]])
    logits = q.log().requires_grad_()
    total, _ = kl_divergence(p.log(), logits, lambda rows, _s, _e: rows, lambda rows, _s, _e: rows)
    assert float(total.detach()) == pytest.approx(0.25 * math.log(2))
    (grad,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(grad, q - p)


def test_a_word_that_only_q_cannot_say_is_as_far_as_numbers_go() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
    total, _ = kl_divergence(p.log(), q.log(), lambda rows, _s, _e: rows, lambda rows, _s, _e: rows)
    assert float(total) > 1e37
