"""The two code books: NF4's sixteen values and the 256 of the 8-bit map for the block scales, with their tables."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float, Int, UInt8

# QLoRA, Dettmers et al. 2023, appendix E: quantiles of a normal distribution scaled to -1..1, zero among them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022833334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
ZERO_CODE = NF4.index(0.0)
BINS = 65536  # -1..1 in equal steps: bitsandbytes' CPU backend finds 8-bit codes by bin, not by exact distance
CPU = torch.device("cpu")


@cache
def nf4_codes(device: torch.device) -> Float[torch.Tensor, " 16"]:
    """The sixteen values, ascending: code i stands for value i."""
    with torch.inference_mode(False):
        return torch.tensor(NF4, dtype=torch.float32, device=device)


@cache
def nf4_midpoints(device: torch.device) -> Float[torch.Tensor, " 15"]:
    """Where the nearest code changes: bucketize(v, midpoints) is the code of v, a tie going to the lower."""
    with torch.inference_mode(False):
        codes = nf4_codes(CPU)
        return ((codes[:-1] + codes[1:]) / 2).to(device)


@cache
def nf4_pairs(device: torch.device) -> Int[torch.Tensor, " 256"]:
    """Per byte its two float32 values, high nibble first, seen as one 64-bit integer: one look-up moves both."""
    with torch.inference_mode(False):
        codes, byte = nf4_codes(CPU), torch.arange(256, device=CPU)
        return torch.stack([codes[byte >> 4], codes[byte & 15]], dim=1).view(torch.int64).flatten().to(device)


@cache
def scale_codes(device: torch.device) -> Float[torch.Tensor, " 256"]:
    """The signed dynamic 8-bit map with 7 exponent bits, ascending (8-bit optimizers, Dettmers et al. 2022).

    Decade e = 0..6 holds the centres of 2^e equal steps between 0.1 and 1, times 10^(e - 6), in both signs;
    with 0 and 1 these are 256 values. There is no -1.
    """
    values = [0.0, 1.0]
    with torch.inference_mode(False):
        for exponent in range(7):
            edges = torch.linspace(0.1, 1.0, 2**exponent + 1, dtype=torch.float32, device=CPU)
            centres = (edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (exponent - 6)
            values += [*centres.tolist(), *(-centres).tolist()]
        return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def scale_bins(device: torch.device) -> UInt8[torch.Tensor, " 65536"]:
    """Per bin of -1..1 the code of scale_codes() nearest to the bin's own value, a tie going to the lower."""
    with torch.inference_mode(False):
        codes = scale_codes(CPU)
        values = 2.0 * torch.arange(BINS, dtype=torch.float32, device=CPU) / (BINS - 1) - 1.0
        return torch.bucketize(values, (codes[:-1] + codes[1:]) / 2).to(torch.uint8).to(device)
