"""NF4 weights: quantise, dequantise whole or by rows, and multiply tile by tile.

QLoRA, Dettmers et al. 2023, sections 3.1 and 3.2. Codes, scales and values have the bits of bitsandbytes 0.50.2
on a CPU; its CUDA backend differs in corners (ties, all-zero blocks). Everything here is plain torch and runs on
the device that holds the tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch.autograd.function import once_differentiable

from postil.errors import BaseModelError, InternalError, listed
from postil.kernels.dense import widens
from postil.kernels.nf4.codes import BINS, ZERO_CODE, nf4_midpoints, nf4_pairs, scale_bins, scale_codes

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # those that bitsandbytes takes
NESTED_BLOCKSIZE = 256
SMALLEST_SCALE = 1e-38  # floor of the divisor: an all-zero block has code ZERO_CODE throughout
SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTISE_VALUES = 2**17  # quantised at a time, so that float32 copies stay small
TILE_VALUES = 2**18  # dequantised at a time on a CPU: 2 MiB of codes, float32 and cast values stay in its caches
WIDE_TILE_VALUES = 2**24  # on other devices, where a launch costs more than memory


@dataclass(frozen=True, slots=True)
class Nf4Weight:
    """A weight [d_out, d_in] as 4-bit codes, row-major, in blocks of `blocksize` values (a block may straddle rows).

    packed: uint8 [ceil(n/2), 1], the first value of a pair in the high nibble; absmax: the block scales,
    float32 [blocks], or uint8 [blocks] when these are themselves quantised (then nested_absmax: float32
    [ceil(blocks/nested_blocksize)], offset: float32 0-d, nested_quant_map: float32 [256]); dtype: that of the
    weight before quantisation.
    """

    packed: UInt8[torch.Tensor, "bytes 1"]
    absmax: torch.Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    nested_absmax: Float[torch.Tensor, " nested"] | None = None
    offset: Float[torch.Tensor, ""] | None = None
    nested_quant_map: Float[torch.Tensor, " 256"] | None = None
    blocksize: int = 64
    nested_blocksize: int = NESTED_BLOCKSIZE

    @property
    def nested(self) -> bool:
        """Whether the block scales are themselves quantised."""
        return self.nested_absmax is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by field name, those that are None left out."""
        names = ("packed", "absmax", "nested_absmax", "offset", "nested_quant_map")
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def to(self, device: torch.device | str) -> Nf4Weight:
        """The same weight on another device."""
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return Nf4Weight(
            **moved,
            shape=self.shape,
            dtype=self.dtype,
            blocksize=self.blocksize,
            nested_blocksize=self.nested_blocksize,
        )


@torch.no_grad()
def quantise(
    weight: Float[torch.Tensor, "d_out d_in"], *, blocksize: int = 64, double: bool = True, name: str = "the weight"
) -> Nf4Weight:
    """NF4 codes and scales of a float32, bfloat16 or float16 weight; `double` quantises the scales too.

    Beside the result it holds float32 copies of 2^17 values at a time. The offset is torch's mean of the scales,
    as bitsandbytes takes it: beyond 32,768 blocks its last bit depends on the number of threads. Raises
    BaseModelError, naming `name`, for another dtype or shape, an unknown blocksize and values that are not finite.
    """
    _check_source(weight, blocksize, name)
    flat = weight.reshape(-1)
    size, device = flat.numel(), flat.device
    absmax = torch.empty(-(-size // blocksize), dtype=torch.float32, device=device)
    packed = torch.empty(-(-size // 2), dtype=torch.uint8, device=device)
    for start in range(0, size, QUANTISE_VALUES):
        part = flat[start : start + QUANTISE_VALUES].float()
        scales = absmax[start // blocksize : -(-(start + part.numel()) // blocksize)]
        codes = _codes(part, scales, blocksize)
        codes = F.pad(codes, (0, codes.numel() % 2), value=ZERO_CODE)
        packed[start // 2 : (start + codes.numel()) // 2] = (codes[::2] << 4) | codes[1::2]
    if not absmax.isfinite().all():
        row, column = (int(index) for index in (~weight.isfinite()).nonzero()[0])
        raise BaseModelError(
            f"{name} holds {float(weight[row, column])} at row {row}, column {column}: "
            "NF4 has no code for it, so mend the base's weights first."
        )
    shape = (weight.shape[0], weight.shape[1])
    if not double:
        return Nf4Weight(packed[:, None], absmax, shape, weight.dtype, blocksize=blocksize)
    offset = absmax.mean()
    if not offset.isfinite():
        raise BaseModelError(
            f"{name} holds values so large that the mean of its block scales overflows: "
            "double quantisation cannot hold them, so leave it off."
        )
    scales, nested_absmax = _quantise_scales(absmax - offset)
    return Nf4Weight(
        packed[:, None],
        scales,
        shape,
        weight.dtype,
        nested_absmax,
        offset,
        scale_codes(device),
        blocksize,
    )


def dequantise(w: Nf4Weight, dtype: torch.dtype | None = None) -> Float[torch.Tensor, "d_out d_in"]:
    """The whole weight, in its own dtype unless told otherwise (QLoRA, Dettmers et al. 2023, equation 6)."""
    return dequantise_rows(w, 0, w.shape[0], dtype)


@torch.no_grad()
def dequantise_rows(
    w: Nf4Weight, start: int, end: int, dtype: torch.dtype | None = None
) -> Float[torch.Tensor, "rows d_in"]:
    """Rows start..end of the weight; the rest of it is not touched."""
    if not 0 <= start <= end <= w.shape[0]:
        raise InternalError(f"rows {start} to {end} of a weight of {w.shape[0]} rows were asked for.")
    out = torch.empty(end - start, w.shape[1], dtype=dtype or w.dtype, device=w.packed.device)
    for low, high, tile in _row_tiles(w, torch.float32, start, end):
        out[low - start : high - start] = tile  # cast on the way
    return out


def matmul(
    x: Float[torch.Tensor, "n d_in"], w: Nf4Weight, bias: Float[torch.Tensor, " d_out"] | None = None
) -> Float[torch.Tensor, "n d_out"]:
    """x W^T + b in x's dtype, W dequantised tile by tile; gradients flow to x and b."""
    y: torch.Tensor = _Matmul.apply(x, w, bias)  # type: ignore[no-untyped-call]
    return y


def matmul_t(g: Float[torch.Tensor, "n d_out"], w: Nf4Weight) -> Float[torch.Tensor, "n d_in"]:
    """g W in g's dtype, W dequantised tile by tile; no gradient flows (the backward pass of `matmul`)."""
    return _product_t(g, w)


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: Nf4Weight, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.w = w
        return _product(x, w, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        dx = _product_t(g, ctx.w) if ctx.needs_input_grad[0] else None
        return dx, None, g.sum(0) if ctx.needs_input_grad[2] else None


def _product(x: torch.Tensor, w: Nf4Weight, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x.float() if widens(x) else x
    y = x.new_empty(x.shape[0], w.shape[0])
    if not x.shape[0]:
        return y
    for start, end, tile in _row_tiles(w, x.dtype, 0, w.shape[0]):
        if rows is not x:
            part = rows @ tile.float().T
            y[:, start:end] = part if bias is None else part.add_(bias[start:end])  # rounded on the way
        elif bias is None:
            torch.mm(x, tile.T, out=y[:, start:end])
        else:
            torch.addmm(bias[start:end], x, tile.T, out=y[:, start:end])
    return y


@torch.no_grad()
def _product_t(g: torch.Tensor, w: Nf4Weight) -> torch.Tensor:
    d_out, d_in = w.shape
    if not g.shape[0]:
        return g.new_empty(0, d_in)
    rows = g.float() if widens(g) else g
    if d_in % w.blocksize:  # blocks straddle rows: sum over tiles of rows, in float32 or better
        total = g.new_zeros(g.shape[0], d_in, dtype=torch.promote_types(g.dtype, torch.float32))
        for start, end, tile in _row_tiles(w, g.dtype, 0, d_out):
            total += rows[:, start:end] @ tile.to(rows.dtype)
        return total.to(g.dtype)
    dx = g.new_empty(g.shape[0], d_in)
    for start, end, tile in _column_tiles(w, g.dtype):  # each column's sum over all d_out in one product
        if rows is g:
            torch.mm(g, tile, out=dx[:, start:end])
        else:
            dx[:, start:end] = rows @ tile.float()
    return dx


def _row_tiles(w: Nf4Weight, dtype: torch.dtype, start: int, end: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(from row, to row, their values): the values' memory is written again by the next tile."""
    d_in = w.shape[1]
    high = max(_tile_values(w) // d_in // 16, 1) * 16  # fewer than 16 rows cost a product four times as much
    rows = max(min(high, end - start), 1)
    if d_in % w.blocksize:
        for low in range(start, end, rows):
            high = min(low + rows, end)
            yield low, high, _range(w, low * d_in, high * d_in).view(high - low, d_in).to(dtype)
        return
    codes, scales = _grid(w)
    buffers = _Buffers(rows * d_in, dtype, codes.device)
    for low in range(start, end, rows):
        high = min(low + rows, end)
        yield low, high, buffers.fill(codes[low:high], scales[low:high])


def _column_tiles(w: Nf4Weight, dtype: torch.dtype) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(from column, to column, all rows' values there), where no block straddles rows."""
    codes, scales = _grid(w)
    d_out, blocks = scales.shape
    step = min(max(_tile_values(w) // (d_out * w.blocksize), 1), blocks)
    buffers = _Buffers(d_out * step * w.blocksize, dtype, codes.device)
    for low in range(0, blocks, step):
        high = min(low + step, blocks)
        yield low * w.blocksize, high * w.blocksize, buffers.fill(codes[:, low:high], scales[:, low:high])


def _tile_values(w: Nf4Weight) -> int:
    return TILE_VALUES if w.packed.device.type == "cpu" else WIDE_TILE_VALUES


def _grid(w: Nf4Weight) -> tuple[UInt8[torch.Tensor, "d_out blocks half"], Float[torch.Tensor, "d_out blocks"]]:
    """Bytes and scales by row and block of the row."""
    d_out, d_in = w.shape
    blocks = d_in // w.blocksize
    return w.packed.view(d_out, blocks, w.blocksize // 2), _scales(w).view(d_out, blocks)


class _Buffers:
    """The memory of one tile: bytes as indices, values in float32, values cast."""

    __slots__ = ("cast", "indices", "serial", "values")

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.serial = device.type == "cpu" and torch.get_num_threads() == 1
        self.indices = torch.empty(size // 2, dtype=torch.int32 if self.serial else torch.int64, device=device)
        self.values = torch.empty(size // 2, dtype=torch.int64, device=device)
        self.cast = torch.empty(size, dtype=dtype, device=device) if dtype != torch.float32 else None

    def fill(
        self, codes: UInt8[torch.Tensor, "rows blocks half"], scales: Float[torch.Tensor, "rows blocks"]
    ) -> Float[torch.Tensor, "rows columns"]:
        """table[code] · scale in float32, then cast."""
        rows, blocks, half = codes.shape
        table, count = nf4_pairs(codes.device), codes.numel()
        indices, pairs = self.indices[:count], self.values[:count]
        indices.view(codes.shape).copy_(codes)
        if self.serial:  # the same look-up; gather takes 64-bit indices, but runs on all threads
            torch.index_select(table, 0, indices, out=pairs)
        else:
            torch.gather(table.expand(rows, 256), 1, indices.view(rows, -1), out=pairs.view(rows, -1))
        values = pairs.view(torch.float32)
        values.view(rows, blocks, 2 * half).mul_(scales[..., None])
        values = values if self.cast is None else self.cast[: 2 * count].copy_(values)
        return values.view(rows, -1)


def _range(w: Nf4Weight, first: int, last: int) -> Float[torch.Tensor, " values"]:
    """Values first..last of the flattened weight in float32, whatever row and block they lie in."""
    codes = w.packed[first // 2 : -(-last // 2), 0].long()
    pairs = nf4_pairs(codes.device)[codes].view(torch.float32)
    blocks = torch.arange(first, last, device=codes.device) // w.blocksize
    return pairs[first % 2 : first % 2 + last - first] * _scales(w)[blocks]


def _scales(w: Nf4Weight) -> Float[torch.Tensor, " blocks"]:
    """The block scales in float32: as stored, or map[code] · nested scale + offset."""
    if w.nested_absmax is None or w.nested_quant_map is None or w.offset is None:
        return w.absmax
    scales = torch.index_select(w.nested_quant_map, 0, w.absmax.int())
    full = scales.numel() // w.nested_blocksize
    size = full * w.nested_blocksize
    scales[:size].view(full, w.nested_blocksize).mul_(w.nested_absmax[:full, None])
    scales[size:].mul_(w.nested_absmax[-1])
    return scales.add_(w.offset)


def _codes(part: torch.Tensor, scales: torch.Tensor, blocksize: int) -> torch.Tensor:
    """The code of each value; `scales` is written. A full block times 1/absmax, the ragged last one by its absmax."""
    full = part.numel() // blocksize
    blocks, tail = part[: full * blocksize].view(full, blocksize), part[full * blocksize :]
    torch.amax(blocks.abs(), dim=1, out=scales[:full])
    normed = torch.empty_like(part)
    factors = scales[:full].clamp(min=SMALLEST_SCALE).reciprocal_()
    torch.mul(blocks, factors[:, None], out=normed[: full * blocksize].view(full, blocksize))
    if tail.numel():
        scales[full] = tail.abs().amax().clamp(min=SMALLEST_SCALE)  # stored with the floor
        torch.div(tail, scales[full], out=normed[full * blocksize :])
    return torch.bucketize(normed.clamp_(-1, 1), nf4_midpoints(part.device), out_int32=True)


def _quantise_scales(
    scales: Float[torch.Tensor, " blocks"],
) -> tuple[UInt8[torch.Tensor, " blocks"], Float[torch.Tensor, " nested"]]:
    """8-bit codes of the scales less their offset, and an absmax per 256 of them (section 3.2)."""
    rows = F.pad(scales, (0, -scales.numel() % NESTED_BLOCKSIZE)).view(-1, NESTED_BLOCKSIZE)
    absmax = rows.abs().amax(1)
    normed = (rows * absmax.reciprocal()[:, None]).clamp_(-1, 1).nan_to_num_(nan=-1.0)  # 0 · inf: the first code
    bins = normed.add_(1.0).mul_((BINS - 1) / 2).add_(0.5).to(torch.int32)
    codes = torch.index_select(scale_bins(scales.device), 0, bins.flatten())
    return codes[: scales.numel()], absmax


def _check_source(weight: torch.Tensor, blocksize: int, name: str) -> None:
    if weight.dtype not in SOURCE_DTYPES:
        kinds = listed(str(dtype).removeprefix("torch.") for dtype in SOURCE_DTYPES)
        raise BaseModelError(f"{name} is of dtype {weight.dtype}: NF4 is made from one of {kinds}.")
    if weight.ndim != 2 or not weight.numel():
        raise BaseModelError(f"{name} has shape {list(weight.shape)}: NF4 takes a matrix that is not empty.")
    if blocksize not in BLOCKSIZES:
        raise BaseModelError(f"a blocksize of {blocksize} is none of {listed(BLOCKSIZES)}.")
