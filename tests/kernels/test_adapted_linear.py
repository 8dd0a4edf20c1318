"""adapted_linear against its reference: outputs and every gradient, on spans of every shape."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postil.errors import AdapterError, InternalError
from postil.kernels.adapted_linear import AdapterSlot, Group, adapted_linear
from postil.kernels.adapted_linear.reference import adapted_linear_reference
from postil.kernels.layout import Span, Spans

D_IN, D_OUT = 6, (5, 3, 7)
UNKNOWN = 9


@dataclass(frozen=True)
class Dense:
    """The plainest projection."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def matmul_t(self, g: torch.Tensor) -> torch.Tensor:
        return g @ self.weight


def make_slot(
    generator: torch.Generator, ranks: tuple[int, ...], biases: tuple[bool, ...], dropout: float
) -> AdapterSlot:
    """A slot of float32 leaves; rank 0 leaves a member alone."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    return AdapterSlot(
        a=leaf(sum(ranks), D_IN),
        b=tuple(leaf(d, rank) if rank else None for d, rank in zip(D_OUT, ranks, strict=True)),
        scales=(0.5, 2.0, 1.25),
        biases=tuple(leaf(d) if has else None for d, has in zip(D_OUT, biases, strict=True)),
        dropout=dropout,
    )


def make_group(seed: int = 0, dtype: torch.dtype = torch.float32) -> Group:
    """Three members (two with a bias) and five slots: ranks differ, members left alone, biases, dropout."""
    generator = torch.Generator().manual_seed(seed)
    members = [
        Dense(
            torch.randn(d, D_IN, generator=generator).to(dtype),
            torch.randn(d, generator=generator).to(dtype) if j != 2 else None,
        )
        for j, d in enumerate(D_OUT)
    ]
    none = (False, False, False)
    slots = {
        0: make_slot(generator, (2, 2, 2), none, 0.0),
        1: make_slot(generator, (1, 4, 3), (True, True, False), 0.0),
        2: make_slot(generator, (3, 0, 1), (False, True, False), 0.4),
        3: make_slot(generator, (0, 2, 0), none, 0.4),
        4: make_slot(generator, (0, 0, 0), (True, False, False), 0.0),
    }
    return Group("layer.qkv", members, slots)


def make_x(rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(1000 + seed)).to(dtype)


def leaves(group: Group) -> list[torch.Tensor]:
    return [tensor for slot in group.slots.values() for tensor in slot.tensors() if tensor is not None]


def run(function, x: torch.Tensor, group: Group, spans: Spans, wants_x: bool = True):  # type: ignore[no-untyped-def]
    """Outputs, and the gradients of x and every leaf (zeros where none came)."""
    x = x.detach().clone().requires_grad_(wants_x)
    outputs = function(x, group, spans)
    inputs = ([x] if wants_x else []) + leaves(group)
    generator = torch.Generator().manual_seed(77)
    loss = sum((y.float() * torch.randn(y.shape, generator=generator)).sum() for y in outputs)
    if not loss.requires_grad:
        return outputs, [torch.zeros_like(tensor) for tensor in inputs]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return outputs, [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, grads, strict=True)]


def assert_same(x: torch.Tensor, group: Group, spans: Spans, wants_x: bool = True, tolerance: float = 1e-5) -> None:
    outputs, grads = run(adapted_linear, x, group, spans, wants_x)
    expected, expected_grads = run(adapted_linear_reference, x, group, spans, wants_x)
    assert len(outputs) == len(expected) == len(D_OUT)
    for got, want in zip([*outputs, *grads], [*expected, *expected_grads], strict=True):
        assert got.dtype == want.dtype
        size = max(1.0, want.abs().max().item() if want.numel() else 0.0)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * size)


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, Spans]:
    rows = draw(st.integers(0, 11))
    spans = []
    for _ in range(draw(st.integers(0, 5))):
        start, end = sorted((draw(st.integers(0, rows)), draw(st.integers(0, rows))))
        slot = draw(st.sampled_from([0, 1, 2, 3, 4, UNKNOWN]))
        spans.append(Span(start, end, slot, draw(st.sampled_from([1.0, 0.3, -2.0, 0.0])), draw(st.integers(0, 3))))
    return rows, Spans.of(spans)


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 5), st.booleans())
def test_equals_the_reference(case: tuple[int, Spans], seed: int, wants_x: bool) -> None:
    rows, spans = case
    assert_same(make_x(rows, seed), make_group(seed), spans, wants_x)


NAMED = {
    "none": (),
    "all": (Span(0, 13, 1),),
    "touching": (Span(0, 5, 0), Span(5, 6, 1), Span(6, 13, 2, seed=5)),
    "overlapping": (Span(1, 8, 0, 0.7), Span(4, 12, 1, 0.3), Span(4, 12, 1, 0.5)),
    "unknown": (Span(0, 4, UNKNOWN), Span(4, 9, 0)),
    "same slot twice": (Span(0, 3, 1), Span(7, 13, 1, -1.5)),
    "members left alone": (Span(2, 9, 3, seed=8), Span(5, 11, 2)),
    "bias alone": (Span(1, 12, 4, 0.5),),
    "dropout": (Span(0, 6, 2, seed=3), Span(6, 13, 2, seed=4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMED)
def test_named_spans_equal_the_reference(name: str, dtype: torch.dtype) -> None:
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    assert_same(make_x(13, dtype=dtype), make_group(dtype=dtype), Spans(NAMED[name]), tolerance=tolerance)


def test_by_the_equation() -> None:
    group, x = make_group(), make_x(4)
    slot, member = group.slots[1], group.members[1]
    got = adapted_linear(x, group, Spans((Span(1, 3, 1, 0.5),)))[1]
    expected = x @ member.weight.T + member.bias
    expected[1:3] += 0.5 * (2.0 * (x[1:3] @ slot.a[1:5].T) @ slot.b[1].T + slot.biases[1] - member.bias)
    torch.testing.assert_close(got, expected)


def test_a_bias_of_weight_one_replaces_the_bases_own() -> None:
    group, x = make_group(), make_x(4)
    got = adapted_linear(x, group, Spans((Span(0, 4, 4),)))[0]
    torch.testing.assert_close(got, x @ group.members[0].weight.T + group.slots[4].biases[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_no_span_are_the_bare_base_bit_for_bit(dtype: torch.dtype) -> None:
    group, x = make_group(dtype=dtype), make_x(13, dtype=dtype)
    outputs = adapted_linear(x, group, Spans((Span(2, 5, 0), Span(7, 9, 1), Span(9, 11, UNKNOWN))))
    free = [0, 1, 5, 6, 9, 10, 11, 12]
    for member, y in zip(group.members, outputs, strict=True):
        base = member.matmul(x)
        assert torch.equal(y[free], base[free])
        assert not torch.equal(y[2:5], base[2:5])


def test_a_rows_result_does_not_depend_on_other_spans() -> None:
    group, x = make_group(), make_x(13)
    own = Span(3, 7, 2, seed=6)
    alone = adapted_linear(x, group, Spans((own,)))
    among = adapted_linear(x, group, Spans((Span(0, 3, 1), own, Span(7, 13, 2, seed=9))))
    for y, z in zip(alone, among, strict=True):
        assert torch.equal(y[3:7], z[3:7])


def test_no_gradient_for_x_that_needs_none() -> None:
    group = make_group()

    def refuse(self: Dense, g: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the base was asked for a gradient that nobody wants")

    group.members = [type("Forward", (Dense,), {"matmul_t": refuse})(m.weight, m.bias) for m in group.members]
    outputs = adapted_linear(make_x(5), group, Spans((Span(0, 5, 0),)))
    sum(y.sum() for y in outputs).backward()
    assert group.slots[0].a.grad is not None


def test_one_output_alone_may_be_used() -> None:
    x, spans = make_x(8), Spans((Span(0, 6, 1), Span(3, 8, 2, seed=2)))

    def second(x: torch.Tensor, group: Group, spans: Spans) -> tuple[torch.Tensor, ...]:
        return (adapted_linear(x, group, spans)[1],)

    def second_reference(x: torch.Tensor, group: Group, spans: Spans) -> tuple[torch.Tensor, ...]:
        return (adapted_linear_reference(x, group, spans)[1],)

    group = make_group()
    for got, want in zip(run(second, x, group, spans)[1], run(second_reference, x, group, spans)[1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_cast_follows_a_change_in_place_and_a_new_tensor() -> None:
    group = make_group(dtype=torch.bfloat16)
    x, spans, slot = make_x(5, dtype=torch.bfloat16), Spans((Span(0, 5, 0),)), group.slots[0]

    def assert_current() -> None:
        for got, want in zip(adapted_linear(x, group, spans), adapted_linear_reference(x, group, spans), strict=True):
            torch.testing.assert_close(got, want, rtol=4e-2, atol=0.3)

    with torch.no_grad():
        assert_current()
        slot.a.add_(5.0)
        assert_current()
        for step in range(20):  # a freed tensor's id may come again
            slot.a = torch.full((6, D_IN), float(4 * (step % 5)))
            assert_current()


def test_inference_mode() -> None:
    with torch.inference_mode():
        group, x, spans = make_group(dtype=torch.bfloat16), make_x(5, dtype=torch.bfloat16), Spans((Span(1, 4, 1),))
        got, want = adapted_linear(x, group, spans), adapted_linear_reference(x, group, spans)
    for y, z in zip(got, want, strict=True):
        torch.testing.assert_close(y, z, rtol=4e-2, atol=0.1)


@pytest.mark.parametrize("written", ["a", "b"])
def test_values_written_between_the_passes_are_noticed(written: str) -> None:
    group, x = make_group(), make_x(5)
    outputs = adapted_linear(x, group, Spans((Span(0, 5, 1),)))
    with torch.no_grad():
        (group.slots[1].a if written == "a" else group.slots[1].b[2]).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outputs[0].sum().backward()


@pytest.mark.parametrize("later", ["nothing", "another"])
def test_an_adapter_that_is_gone_by_the_backward_pass_is_an_error(later: str) -> None:
    group = make_group()
    outputs = adapted_linear(make_x(5), group, Spans((Span(0, 5, 1),)))
    del group.slots[1]
    if later == "another":
        group.slots[1] = make_group(seed=9).slots[1]
    with pytest.raises(AdapterError, match="removed after the forward pass"):
        outputs[0].sum().backward()


def test_a_model_moved_without_its_adapters_is_named() -> None:
    with pytest.raises(AdapterError, match="moved to meta after an adapter was attached, which lies on cpu"):
        adapted_linear(make_x(5).to("meta"), make_group(), Spans((Span(0, 5, 1),)))


def test_casts_of_tensors_that_were_replaced_are_let_go() -> None:
    slot = make_group(dtype=torch.bfloat16).slots[0]
    kept = [torch.randn(6, D_IN) for _ in range(3)]
    for tensor in kept:
        slot.cast(tensor, torch.bfloat16)
    for _ in range(20):
        slot.cast(torch.randn(6, D_IN), torch.bfloat16)
    assert len(slot._casts) <= len(kept) + 1


def test_a_span_outside_the_batch_is_refused() -> None:
    with pytest.raises(InternalError, match=r"span 2\.\.6 does not fit a batch of 5 rows"):
        adapted_linear(make_x(5), make_group(), Spans((Span(2, 6, 0),)))
