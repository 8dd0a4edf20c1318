"""matmul and matmul_t: x W^T + b and g W with a dense frozen W, in float32 where a CPU multiplies 16 bits slowly.

A CPU without 16-bit products (most laptops: no AVX512-BF16, no AMX) takes three to six times as long in bfloat16
as in float32. A product of two bfloat16 or float16 values is exact in float32, so cast tile by tile, summed in
float32 and rounded once, the result is what such instructions would give, up to the order of the sum.
"""

from __future__ import annotations

import functools
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch.autograd.function import once_differentiable

TILE_VALUES = 2**20  # of a weight cast at a time: 4 MiB in float32
BLOCK_ROWS = 1024  # rows of x cast at a time
WIDE_ROWS = 16  # with fewer rows casting the weight takes longer than it saves (bench/LOG.md)


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products of `dtype` (other processors than x86: as torch does)."""
    if dtype not in (torch.bfloat16, torch.float16) or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    if dtype == torch.float16:
        built = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        return bool(built and torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return any(getattr(torch.cpu, name)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def instructions() -> str:
    """What this processor multiplies with, on which the last bits of results depend: `AVX512, bfloat16, float16 in
    float32 tiles`."""
    kinds = (torch.bfloat16, torch.float16)
    how = [f"{str(kind).removeprefix('torch.')}{'' if multiplies(kind) else ' in float32 tiles'}" for kind in kinds]
    return ", ".join([torch.backends.cpu.get_cpu_capability(), *how])


def widens(x: torch.Tensor) -> bool:
    """Whether products of these rows [..., d] are made in float32 tiles. Fewer rows go torch's own way, which sums in
    float32 and rounds once as well: how many rows there are changes the order of the sums, no more."""
    return x.device.type == "cpu" and x.numel() >= WIDE_ROWS * x.shape[-1] > 0 and not multiplies(x.dtype)


def matmul(
    x: Float[torch.Tensor, "*n d_in"],
    weight: Float[torch.Tensor, "d_out d_in"],
    bias: Float[torch.Tensor, " d_out"] | None = None,
) -> Float[torch.Tensor, "*n d_out"]:
    """x W^T + b in x's dtype, that of the weight; gradients flow to x (and, by torch, to a W or b that wants one)."""
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    if trained or weight.dtype != x.dtype or not widens(x):
        return F.linear(x, weight, bias)
    y: torch.Tensor = _Matmul.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y


def matmul_t(
    g: Float[torch.Tensor, "*n d_out"], weight: Float[torch.Tensor, "d_out d_in"]
) -> Float[torch.Tensor, "*n d_in"]:
    """g W in g's dtype; no gradient flows (the backward pass of `matmul`, and of the ops that stand on it)."""
    return _product_t(g, weight) if weight.dtype == g.dtype and widens(g) else g @ weight


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)  # not copied: read again in the backward pass, refused where it was written to
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        (weight,) = ctx.saved_tensors
        return matmul_t(g, weight) if ctx.needs_input_grad[0] else None, None, None


@torch.no_grad()
def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    for rows, out in _blocks(x, y):
        wide = _memory("rows", *rows.shape).copy_(rows)
        for start, end, tile in _tiles(weight):
            part = torch.mm(wide, tile.T, out=_memory("out", len(rows), end - start))
            out[:, start:end] = part if bias is None else part.add_(bias[start:end])  # rounded on the way
    return y


@torch.no_grad()
def _product_t(g: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    dx = g.new_empty(*g.shape[:-1], weight.shape[1])
    for rows, out in _blocks(g, dx):
        total = _memory("out", *out.shape).zero_()
        for start, end, tile in _tiles(weight):
            total.addmm_(_memory("rows", len(rows), end - start).copy_(rows[:, start:end]), tile)
        out.copy_(total)
    return dx


def _blocks(x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Blocks of the rows of x and the same rows of y, a new contiguous tensor."""
    flat = (torch.split(tensor.reshape(-1, tensor.shape[-1]), BLOCK_ROWS) for tensor in (x, y))
    return zip(*flat, strict=True)


def _tiles(weight: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(from row, to row, these rows in float32): the values' memory is written again by the next tile."""
    d_out, d_in = weight.shape
    step = max(TILE_VALUES // max(d_in, 1), 1)
    for start in range(0, d_out, step):
        end = min(start + step, d_out)
        yield start, end, _memory("tile", end - start, d_in).copy_(weight[start:end])


def _memory(use: str, rows: int, columns: int) -> torch.Tensor:
    """This thread's float32 memory [rows, columns] for one use, kept: made anew in every product it tears holes in
    the heap, 15% of a training step's peak (bench/LOG.md)."""
    known: torch.Tensor | None = getattr(_kept, use, None)
    if known is None or known.numel() < rows * columns:
        with torch.inference_mode(mode=False):
            known = torch.empty(rows * columns, dtype=torch.float32)
        setattr(_kept, use, known)
    return known[: rows * columns].view(rows, columns)


_kept = threading.local()


@contextmanager
def memory_apart() -> Iterator[None]:
    """This thread's kept memory is made anew in here and forgotten afterwards: for tensors without data."""
    mine = vars(_kept)
    before = dict(mine)
    mine.clear()
    try:
        yield
    finally:
        mine.clear()
        mine.update(before)
