"""Fresh memory is NaN in every test of the kernels, so that a value read before it is written shows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils import deterministic


@pytest.fixture(autouse=True, scope="module")
def fresh_memory_is_nan() -> Iterator[None]:
    """torch fills what torch.empty returns with NaN while deterministic algorithms are on."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    deterministic.fill_uninitialized_memory = before[1]
