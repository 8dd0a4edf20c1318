"""The plain torch form of NF4: every step over the whole matrix, as the paper and bitsandbytes' CPU path have it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8

from postil.kernels.nf4.codes import BINS, ZERO_CODE, nf4_codes, nf4_midpoints, scale_bins, scale_codes
from postil.kernels.nf4.op import SMALLEST_SCALE, Nf4Weight


def quantise_reference(
    weight: Float[torch.Tensor, "d_out d_in"], *, blocksize: int = 64, double: bool = True
) -> Nf4Weight:
    """NF4 codes and scales of a finite weight (QLoRA, Dettmers et al. 2023, equations 1 and 2, section 3.2)."""
    flat = weight.detach().float().flatten()
    full = flat.numel() // blocksize * blocksize
    blocks, tail = flat[:full].view(-1, blocksize), flat[full:]
    absmax = blocks.abs().amax(1)
    normed = (blocks * absmax.clamp(min=SMALLEST_SCALE).reciprocal()[:, None]).flatten()
    if tail.numel():  # the ragged last block divides, and stores its scale with the floor
        scale = tail.abs().amax().clamp(min=SMALLEST_SCALE)
        absmax, normed = torch.cat([absmax, scale[None]]), torch.cat([normed, tail / scale])
    codes = torch.bucketize(normed.clamp(-1, 1), nf4_midpoints(flat.device))
    codes = F.pad(codes, (0, flat.numel() % 2), value=ZERO_CODE)
    packed = (codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None]
    shape = (weight.shape[0], weight.shape[1])
    if not double:
        return Nf4Weight(packed, absmax, shape, weight.dtype, blocksize=blocksize)
    offset = absmax.mean()
    scales, nested = _quantise_scales(absmax - offset)
    return Nf4Weight(
        packed, scales, shape, weight.dtype, nested, offset, scale_codes(flat.device), blocksize=blocksize
    )


def _quantise_scales(
    scales: Float[torch.Tensor, " blocks"],
) -> tuple[UInt8[torch.Tensor, " blocks"], Float[torch.Tensor, " nested"]]:
    padded = F.pad(scales, (0, -scales.numel() % 256)).view(-1, 256)
    absmax = padded.abs().amax(1)
    normed = (padded * absmax.reciprocal()[:, None]).clamp(-1, 1).nan_to_num(nan=-1.0)  # 0 · inf: the first code
    bins = (normed + 1.0) * ((BINS - 1) / 2) + 0.5
    return scale_bins(scales.device)[bins.long()].flatten()[: scales.numel()], absmax


def scales_reference(w: Nf4Weight) -> Float[torch.Tensor, " blocks"]:
    """The block scales: absmax as stored, or map[code] · nested scale + offset."""
    if w.nested_absmax is None or w.nested_quant_map is None or w.offset is None:
        return w.absmax
    nested = w.nested_absmax.repeat_interleave(w.nested_blocksize)[: w.absmax.numel()]
    return w.nested_quant_map[w.absmax.long()] * nested + w.offset


def dequantise_reference(w: Nf4Weight, dtype: torch.dtype | None = None) -> Float[torch.Tensor, "d_out d_in"]:
    """table[code] · scale in float32, then cast (QLoRA, Dettmers et al. 2023, equation 6)."""
    size = w.shape[0] * w.shape[1]
    byte = w.packed.flatten().long()
    codes = torch.stack([byte >> 4, byte & 15], dim=1).flatten()[:size]
    scales = scales_reference(w).repeat_interleave(w.blocksize)[:size]
    return (nf4_codes(byte.device)[codes] * scales).view(w.shape).to(dtype or w.dtype)


def dequantise_rows_reference(
    w: Nf4Weight, start: int, end: int, dtype: torch.dtype | None = None
) -> Float[torch.Tensor, "rows d_in"]:
    """Rows start..end of the weight."""
    return dequantise_reference(w, dtype)[start:end]


def matmul_reference(
    x: Float[torch.Tensor, "n d_in"], w: Nf4Weight, bias: Float[torch.Tensor, " d_out"] | None = None
) -> Float[torch.Tensor, "n d_out"]:
    """x W^T + b with W dequantised to x's dtype."""
    return F.linear(x, dequantise_reference(w, x.dtype), bias)


def matmul_t_reference(g: Float[torch.Tensor, "n d_out"], w: Nf4Weight) -> Float[torch.Tensor, "n d_in"]:
    """g W with W dequantised to g's dtype."""
    return g @ dequantise_reference(w, g.dtype)
