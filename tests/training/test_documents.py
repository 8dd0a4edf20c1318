"""General rows for training: prose and chat from files, lists and the shipped samples, errors with their place."""

from __future__ import annotations

import json
import re
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import options_of

from byte_base import EOS, byte_base
from postil.adapter import AdaptedModel, attach
from postil.data.shipped import shipped_rows
from postil.errors import DataError
from postil.training import TrainOptions
from postil.training.documents import general_documents
from postil.training.general import split_general


@pytest.fixture
def chat_model() -> AdaptedModel:
    return attach(byte_base())


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_of_every_kind_are_read(chat_model: AdaptedModel) -> None:
    rows = [
        {"text": "Some prose."},
        {"prompt": "Hello?"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello yourself"}]},
        {"prompt": "Say yes", "completion": "yes"},
    ]
    told: list[tuple[int, int]] = []
    found = general_documents(chat_model, rows, done=lambda done, total: told.append((done, total)))
    assert len(found.prose) == 1
    assert [sample.row for sample in found.chat] == [2, 3, 4]
    asked, given, pair = found.chat
    assert told[-1] == (1, 1)  # one prompt only is the base's to answer
    learned = chat_model.base.tokenizer.decode(given.ids[given.weights > 0].tolist())
    assert learned == "Hello yourself<|im_end|>"
    assert chat_model.base.tokenizer.decode(pair.ids[pair.weights > 0].tolist()) == "yes<|im_end|>"
    assert asked.weights[0] == 0
    assert asked.weights[-1] == 1
    assert 0 < asked.target_tokens <= 25


def test_files_lists_and_the_shipped_samples_join(chat_model: AdaptedModel, tmp_path: Path) -> None:
    one = written(tmp_path / "a.jsonl", [{"text": "First."}, {"prompt": "a?"}])
    two = written(tmp_path / "b.jsonl", [{"prompt": "b?"}])
    found = general_documents(chat_model, [one, two])
    assert (len(found.prose), len(found.chat)) == (1, 2)
    assert [sample.row for sample in found.chat] == [2, 3]
    assert general_documents(chat_model, one).sha256 != found.sha256
    assert general_documents(chat_model, [str(one), str(two)]).sha256 == found.sha256


def test_what_ships_holds_both_kinds_and_nothing_that_is_judged(chat_model: AdaptedModel) -> None:
    held = {json.dumps(row, sort_keys=True) for name in ("hold_prose", "hold_chat") for row in shipped_rows(name)}
    judged = {json.dumps(row, sort_keys=True) for name in ("general", "chat") for row in shipped_rows(name)}
    assert not held & judged
    prompts = {row.get("prompt", "").lower() for row in shipped_rows("chat")} - {""}
    assert not prompts & {row.get("prompt", "").lower() for row in shipped_rows("hold_chat")}
    assert len(shipped_rows("chat")) == 100
    kinds = {row["kind"] for row in shipped_rows("chat")}
    assert kinds == {row["kind"] for row in shipped_rows("hold_chat")}
    assert len(kinds) >= 15
    found = general_documents(chat_model)
    assert len(found.prose) == len(shipped_rows("hold_prose"))
    assert len(found.chat) == len(shipped_rows("hold_chat")) > 400
    assert found.sha256 is not None


def test_no_prompt_held_to_is_nearly_a_judged_one() -> None:
    judged = [_words(row) for row in shipped_rows("chat")]
    held = [_words(row) for row in shipped_rows("hold_chat")]
    assert max(_shared(one, other) for one in held for other in judged) < 0.7
    assert max(_shared(one, other) for one, other in combinations(held, 2)) < 0.7


def _words(row: dict[str, Any]) -> set[str]:
    """The words of a prompt or of a whole conversation; the signs where it has no word."""
    said = " ".join(turn["content"] for turn in row.get("messages", ())) or row["prompt"]
    return set(re.findall(r"\w+", said.lower())) or set(said)


def _shared(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def test_a_base_without_a_template_holds_to_prose_alone() -> None:
    model = attach(byte_base(template=None))
    found = general_documents(model)
    assert found.chat == ()
    assert len(found.prose) == len(shipped_rows("hold_prose"))
    with pytest.raises(DataError, match=r"row 1: the base has no chat template"):
        general_documents(model, [{"prompt": "a?"}])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"text": 3}, "`text` must be a string, found int"),
        ({"question": "a"}, "needs `messages` or a `prompt`"),
        ({"messages": [{"role": "user"}]}, "content"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(
    chat_model: AdaptedModel, tmp_path: Path, line: dict[str, object], said: str
) -> None:
    path = written(tmp_path / "general.jsonl", [{"text": "fine"}, line])
    with pytest.raises(DataError, match=rf"general.jsonl:2: .*{said}"):
        general_documents(chat_model, path)


def test_a_line_that_is_no_json_is_an_error_or_left_out(chat_model: AdaptedModel, tmp_path: Path) -> None:
    path = tmp_path / "general.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"general.jsonl:2"):
        general_documents(chat_model, path)
    assert len(general_documents(chat_model, path, skip_bad_lines=True).prose) == 1


def test_conversations_longer_than_the_context_are_counted(chat_model: AdaptedModel) -> None:
    rows = [{"prompt": "a?"}, {"prompt": "x" * 300}, {"prompt": "b", "completion": "y" * 300}]
    found = general_documents(chat_model, rows)
    assert len(found.chat) == 1
    assert found.left_out == 2
    lines = split_general(found, TrainOptions(), chat_model.base).lines(options_of())
    assert lines[1] == "2 conversations left out: longer than the base's context, or without an answer"


def test_a_chat_row_ends_as_a_turn_ends(chat_model: AdaptedModel) -> None:
    found = general_documents(chat_model, [{"prompt": "a", "completion": "b"}])
    (sample,) = found.chat
    assert sample.ids[np.flatnonzero(sample.weights)[-1]] == EOS
