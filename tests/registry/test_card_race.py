"""What is published is what the gate read: a card that changes after it was read is noticed, not published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cards import card
from postil.adapter.identity import update_card
from postil.errors import RegistryError
from postil.judging.card.model import ScoreCard
from postil.registry import Registry


def test_a_card_that_changes_once_the_gate_has_read_it_is_not_published(
    judged: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = judged()
    real, changed = ScoreCard.parse, list[Path]()

    def late(values: object) -> Any:
        """The card as it was read; right after that another one lies in its file."""
        found = real(values)
        if not changed:
            changed.append(place)
            update_card(place, score_card=card(bleu=1, nats=9, bytes_of=place).model_dump(mode="json"))
        return found

    monkeypatch.setattr(ScoreCard, "parse", late)
    registry = Registry(tmp_path / "registry")
    with pytest.raises(RegistryError, match="changed while it was published"):
        registry.publish(place, "support")
    assert changed
    monkeypatch.undo()
    with pytest.raises(RegistryError):
        registry.resolve("support")
