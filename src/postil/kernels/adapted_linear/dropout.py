"""Dropout whose masks are a hash of key, row and column: the same however the rows are split, drawn where x lies.

The hash is SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators", figure 17, with
their mix64variant13) at the counter row · words + word; its 64 bits decide over four columns.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int

GOLDEN, FIRST, SECOND = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
LANES = 4  # columns per hash
LEVELS = 2**16  # of one lane: the probability is rounded to them, and the rest scaled by what it then is


def dropped(
    key: int, rows: Int[torch.Tensor, " n"], columns: int, probability: float
) -> Bool[torch.Tensor, "n columns"]:
    """Which values of these rows are dropped; rows: int64, their numbers in the whole step; key: 63 bits."""
    words = -(-columns // LANES)
    z = rows[:, None] * words + torch.arange(1, words + 1, device=rows.device)
    z.mul_(GOLDEN).add_(key)
    _xor_shifted(z, 30).mul_(FIRST)
    _xor_shifted(z, 27).mul_(SECOND)
    _xor_shifted(z, 31)
    lanes = z.view(torch.int16)[:, :columns]
    return lanes < _level(probability) - LEVELS // 2


def dropout(
    x: Float[torch.Tensor, "n columns"], key: int, rows: Int[torch.Tensor, " n"], probability: float
) -> Float[torch.Tensor, "n columns"]:
    """x with the dropped values 0 and the others scaled, so that the expectation is x."""
    scaled = x * (LEVELS / (LEVELS - _level(probability)))
    return scaled.masked_fill_(dropped(key, rows, x.shape[1], probability), 0.0)


def _level(probability: float) -> int:
    return min(round(probability * LEVELS), LEVELS - 1)


def _xor_shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """z ^= z >> bits in place, zeros coming in at the top (torch's shift repeats the sign)."""
    return z.bitwise_xor_((z >> bits).bitwise_and_(2 ** (64 - bits) - 1))
