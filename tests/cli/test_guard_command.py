"""postil train --guard: what it says and leaves, resuming, and each wrong input in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

LETTERS = "etaoin shrdlu"


@pytest.fixture
def general(tmp_path: Path) -> Path:
    """Eight documents of plain text, longer than the base's context."""
    path = tmp_path / "general.jsonl"
    documents = [" ".join(LETTERS[n : n + 5] for n in range(start, start + 40)) for start in range(8)]
    path.write_text("".join(json.dumps({"text": document * 3}) + "\n" for document in documents))
    return path


@pytest.fixture
def train(base: Path, rows: Path, tmp_path: Path) -> tuple[Any, ...]:
    """The words of a command on the tiny base."""
    return ("train", "--base", base, "--data", rows, "--out", tmp_path / "out")


def settings(**values: Any) -> list[str]:
    return [word for key, value in values.items() for word in ("--set", f"training.{key}={value}")]


def test_a_dry_run_says_what_would_be_done_with_the_text(postil: Any, train: Any, general: Path) -> None:
    told = postil(*train, "--guard", 0.05, "--general", general, *settings(kl_weight=0.5), "--dry-run")
    assert told.code == 0
    assert "general ability: 8 documents; " in told.err
    assert "of prose watched at each validation; no state more than 0.05 nats above the base is kept" in told.err
    assert "each step: 0.5 × KL to the base over general rows, 2 of prose (64 tokens)" in told.err


def test_without_a_file_what_ships_is_held_to(postil: Any, train: Any) -> None:
    told = postil(*train, "--guard", 0.05, *settings(kl_weight=0.5), "--dry-run")
    assert told.code == 0
    assert "tokens of prose and" in told.err
    assert "tokens of chat watched at each validation" in told.err
    assert "2 of prose (64 tokens) and 2 of chat" in told.err


def test_chat_rows_of_ones_own_are_held_to(postil: Any, train: Any, rows: Path) -> None:
    told = postil(*train, "--general", rows, *settings(kl_weight=0.5), "--dry-run")
    assert told.code == 0
    assert "each step: 0.5 × KL to the base over general rows, 2 of chat" in told.err


def test_a_guarded_run_says_what_it_kept_and_puts_it_on_the_card(
    postil: Any, train: Any, general: Path, tmp_path: Path
) -> None:
    command = (*train, "--guard", 5, "--general", general, *settings(kl_weight=0.5, general_share=0.25, epochs=2))
    told = postil(*command)
    assert told.code == 0, told
    assert "step 6: held-out loss" in told.err
    assert "nats, KL 0." in told.err
    assert "guard 5: kept step 6 (held-out loss" in told.err
    assert "it cost nothing; watching took" in told.err
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert {"kl_loss", "general_nats", "general_rise", "general_kl", "valid_loss"} <= log[-1].keys()
    before = (tmp_path / "out/adapter/postil.json").read_bytes()
    card = json.loads(before)["card"]
    assert card["result"]["guard"]["step"] == card["result"]["best_step"] == 6
    assert card["result"]["guard"]["rise"] == log[-1]["general_rise"]
    assert len(card["data"]["general_sha256"]) == 64
    again = postil(*command)
    assert "finished before" in again.err
    assert (tmp_path / "out/adapter/postil.json").read_bytes() == before


def test_tensorboard_shows_the_damage(postil: Any, train: Any, general: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    assert postil(*train, "--general", general, *settings(kl_weight=0.5)).code == 0
    (file,) = (tmp_path / "out/tensorboard").iterdir()
    tags = {value.tag for event in EventFileLoader(str(file)).Load() for value in event.summary.value}
    assert {"general_nats", "general_kl", "kl_loss"} <= tags


def test_one_document_is_watched_and_what_nobody_asked_for_is_not_missed(
    postil: Any, train: Any, general: Path, tmp_path: Path
) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text(general.read_text().splitlines()[0] + "\n")
    command = (*train, "--guard", 5, "--general", one, *settings(steps=2))
    for _ in range(2):  # and the finished run is found again
        told = postil(*command)
        assert told.code == 0, told
    assert "kl_weight: 0.0" in (tmp_path / "out/recipe.yaml").read_text()


def test_a_run_that_spoils_everything_ends_in_an_error_and_no_adapter(
    refusal: Any, train: Any, general: Path, tmp_path: Path
) -> None:
    spoilt = (*train, "--guard", 0, "--general", general, "--lr", 30, *settings(warmup=0, steps=2, kl_weight=0))
    for _ in range(2):  # a finished run says the same
        message = refusal(*spoilt)
        assert message.startswith("guard 0: no state that was measured stays within it (step ")
        assert "so the untouched state of step 0 was kept and nothing was learned; lower the learning rate" in message
    assert not (tmp_path / "out/adapter").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--guard", "-1"], "recipe: training: guard: Input should be greater than or equal to 0 (found -1.0)"),
        (["--guard", "x"], "Invalid value for '--guard'"),
        (["--set", "training.gaurd=1"], "recipe: training: unknown key 'gaurd' (did you mean 'guard'?)"),
        (["--general", "nothing.jsonl"], "nothing.jsonl does not exist"),
        (["--general", "BAD"], "bad.jsonl:2: a chat row needs `messages` or a `prompt`"),
        (["--general", "ONE", "--set", "training.kl_weight=1"], "there is 1 general document, and some must be"),
    ],
)
def test_slips(refusal: Any, train: Any, rows: Path, tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "a document"}\n')
    (tmp_path / "bad.jsonl").write_text('{"text": "a document"}\n{"question": "why?"}\n')
    places = {"BAD": str(tmp_path / "bad.jsonl"), "ONE": str(tmp_path / "one.jsonl")}
    assert said in refusal(*train, *(places.get(word, word) for word in words))
    assert not (tmp_path / "out/log.jsonl").exists()
