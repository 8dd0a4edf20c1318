"""What the bare base said is kept: a second judging has the same card without it, and asks where anything differs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from postil.adapter import Adapter
from postil.base import Base, load_base
from postil.base.cache import cache_directory
from postil.judging.judge import judge as judge_with_chat
from postil.judging.options import JudgeOptions

judge = partial(judge_with_chat, chat=None)  # chat: sets/test_chat.py

ROWS = [{"prompt": f"say {n}", "completion": f"{n}!"} for n in range(6)]
PAIRS = [{"good": "a b", "bad": "b a"}, {"good": "one two", "bad": "two"}]
TEXT = [{"text": "some text of no great length, but long enough for windows " * 3}]
TRAIN = [{"prompt": f"tell {n}", "completion": f"{n}."} for n in range(4)]


@pytest.fixture
def stored(make_base: Callable[..., Base], tmp_path: Path) -> Path:
    made = make_base()
    made.model.save_pretrained(tmp_path / "base")
    made.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def judged(base: Base, note: Adapter, **changes: Any) -> tuple[dict[str, Any], set[str]]:
    """The card and the phases that the base was asked in."""
    phases = set()
    given = {"target": ROWS, "pairs": PAIRS, "general": TEXT, "train": TRAIN} | changes
    options = JudgeOptions.parse({"shots": 1, "general": {"window": 32}} | given.pop("options", {}))
    card = judge(base, note, **given, options=options, watch=lambda e: phases.add(e["phase"]), force=True)
    return card.model_dump(exclude={"command"}), {phase for phase in phases if "base" in phase}


ALL = {"likelihoods of the base", "answers of the base", "answers of the base with examples"}


def test_a_second_judging_asks_the_base_nothing_and_has_the_same_card(stored: Path, note: Adapter) -> None:
    first, asked = judged(load_base(stored), note)
    assert asked == ALL
    second, asked = judged(load_base(stored), note)
    assert asked == set()
    assert second == first
    again, asked = judged(load_base(stored), note, options={"fresh": True})
    assert asked == ALL
    assert again == first


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"target": ROWS[:5]}, ALL),
        ({"target": [*ROWS[:5], {"prompt": "say 5", "completion": "6!"}]}, {"likelihoods of the base"}),
        ({"pairs": PAIRS[::-1]}, {"likelihoods of the base"}),
        ({"general": [{"text": TEXT[0]["text"].upper()}]}, {"likelihoods of the base"}),
        ({"options": {"general": {"window": 16}}}, {"likelihoods of the base"}),
        ({"options": {"max_new_tokens": 3}}, ALL - {"likelihoods of the base"}),
        ({"options": {"stop": ["!"]}}, ALL - {"likelihoods of the base"}),
        ({"train": TRAIN[2:]}, {"answers of the base with examples"}),
    ],
)
def test_what_differs_is_asked(changes: dict[str, Any], asked: set[str], stored: Path, note: Adapter) -> None:
    judged(load_base(stored), note)
    assert judged(load_base(stored), note, **changes)[1] == asked


def test_another_base_or_form_is_asked(
    stored: Path, make_base: Callable[..., Base], note: Adapter, tmp_path: Path
) -> None:
    judged(load_base(stored), note)
    assert judged(load_base(stored, dtype="bfloat16"), note)[1] == ALL
    other = make_base(seed=8)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    assert judged(load_base(tmp_path / "other"), note)[1] == ALL


def test_another_end_of_text_or_tokenizer_is_asked(stored: Path, note: Adapter) -> None:
    judged(load_base(stored), note)
    changed = load_base(stored)
    changed.model.generation_config.eos_token_id = [257, 33]
    assert judged(changed, note)[1] == ALL - {"likelihoods of the base"}
    renamed = load_base(stored)
    renamed.tokenizer.backend_tokenizer.add_tokens(["a word of its own"])
    assert judged(renamed, note)[1] == ALL


@pytest.mark.parametrize("spoilt", [None, b"{}", b"[1]", b"null"])
def test_a_spoilt_file_is_asked_again(spoilt: bytes | None, stored: Path, note: Adapter) -> None:
    first, _ = judged(load_base(stored), note)
    files = list((cache_directory() / "judged").iterdir())
    assert len(files) == 3
    for file in files:
        file.write_bytes(spoilt if spoilt is not None else file.read_bytes()[:20])
    second, asked = judged(load_base(stored), note)
    assert asked == ALL
    assert second == first


def test_a_corrected_answer_of_a_choice_is_asked(stored: Path, note: Adapter) -> None:
    rows = [{"context": "say", "choices": ["a", "b c"], "answer": n} for n in (0, 1)]
    judged(load_base(stored), note, choices=rows)
    corrected = [{**row, "answer": 0} for row in rows]
    card, asked = judged(load_base(stored), note, choices=corrected)
    assert asked == {"likelihoods of the base"}
    fresh, _ = judged(load_base(stored), note, choices=corrected, options={"fresh": True})
    assert card == fresh


def test_a_base_changed_in_memory_leaves_nothing(stored: Path, note: Adapter) -> None:
    base = load_base(stored)
    base.changed()
    judged(base, note)
    assert not (cache_directory() / "judged").exists()
