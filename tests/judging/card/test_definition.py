"""Definitions: another option, file, form or way of asking is another digest; the same is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from postil.errors import JudgeError
from postil.judging.card.definition import definition_of, source_of


def test_whatever_defines_a_measure_changes_its_digest() -> None:
    told: dict[str, Any] = {"options": {"lowercase": True}, "stop": ("\n",), "form": "fp32", "file": ""}
    assert definition_of("bleu", told) == definition_of("bleu", dict(reversed(told.items())))
    others = [
        ("chrf", told), ("bleu", told | {"options": {"lowercase": False}}), ("bleu", told | {"stop": ()}),
        ("bleu", told | {"form": "nf4"}), ("bleu", told | {"file": "ab"}), ("bleu", told | {"stop": ("\ud800",)}),
    ]  # fmt: skip
    digests = {definition_of(name, given) for name, given in others}
    assert len(digests) == len(others)
    assert definition_of("bleu", told) not in digests


def test_an_own_files_bytes_are_its_source(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def bleu(answer, row):\n    return 1\n")
    before = source_of(f"{file}:bleu")
    file.write_text("def bleu(answer, row):\n    return 2\n")
    assert len(before) == 64
    assert source_of(f"{file}:bleu") != before
    assert source_of("bleu") == ""
    with pytest.raises(JudgeError, match=r"gone.py could not be read"):
        source_of(f"{tmp_path}/gone.py:bleu")
