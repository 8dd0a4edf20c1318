"""The data settings: strict, each mistake named."""

from __future__ import annotations

from typing import Any

import pytest

from postil.data import DataOptions
from postil.errors import DataError


def test_defaults() -> None:
    options = DataOptions()
    assert (options.format, options.separator, options.learn) == ("auto", "\n", "all")
    assert (options.max_length, options.too_long, options.skip_bad_lines) == (None, "drop", False)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"lern": "all"}, r"unknown key 'lern' \(did you mean 'learn'\?\)"),
        ({"learn": "first"}, r"learn: .*'all', 'last' or 'weight'"),
        ({"max_length": 1}, r"max_length: .*greater than or equal to 2"),
        ({"max_length": "9"}, r"max_length: .*integer"),
        ({"skip_bad_lines": 1}, r"skip_bad_lines"),
        ({"columns": {"promt": "q"}}, r"unknown column 'promt' \(did you mean 'prompt'\?\)"),
    ],
)
def test_mistakes(values: dict[str, Any], error: str) -> None:
    with pytest.raises(DataError, match=error):
        DataOptions(**values)
