"""The adapter's value row by row, packed as text for a card, so that a later version can be compared with it."""

from __future__ import annotations

import base64
import binascii
import zlib

import numpy as np
from numpy.typing import NDArray

from postil.errors import JudgeError

Values = NDArray[np.float64]


def packed(values: Values) -> str:
    """float32 values as base64 of zlib: some hundred bytes for a thousand rows that are right or wrong."""
    with np.errstate(over="ignore"):  # what is no finite float32 is compared with nothing
        return base64.b64encode(zlib.compress(values.astype("<f4").tobytes(), 9)).decode("ascii")


def unpacked(text: str) -> Values:
    """What `packed` took. Raises JudgeError for anything else."""
    try:
        return np.frombuffer(zlib.decompress(base64.b64decode(text, validate=True)), "<f4").astype(np.float64)
    except (binascii.Error, zlib.error, ValueError) as problem:
        raise JudgeError(f"a measure's row_values cannot be read ({problem}); judge the adapter again") from None
