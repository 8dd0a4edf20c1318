"""What base and adapter said is kept as it comes: found again, never where anything differs, within a bound."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from postil.adapter import Adapter, attach
from postil.adapter.merge import merge
from postil.base import Base, load_base
from postil.base.cache import cache_directory
from postil.engine import memory
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


def judged(base: Any, note: Any, **changes: Any) -> tuple[dict[str, Any], set[str]]:
    """The card and the phases that the base was asked in."""
    card, phases = judged_in(base, note, **changes)
    return card, {phase for phase in phases if "base" in phase}


def judged_in(base: Any, note: Any, **changes: Any) -> tuple[dict[str, Any], set[str]]:
    """The card and all phases in which anything was asked."""
    phases = set()
    given = {"target": ROWS, "pairs": PAIRS, "general": TEXT, "train": TRAIN} | changes
    options = JudgeOptions.parse({"shots": 1, "general": {"window": 32}} | given.pop("options", {}))
    card = judge(base, note, **given, options=options, watch=lambda e: phases.add(e["phase"]), force=True)
    return card.model_dump(exclude={"command"}), phases


OWN = {"likelihoods of what is judged", "answers of what is judged"}
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
    assert len(files) == 5  # three of the base, two of the adapter
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


def other_note(note: Adapter) -> Adapter:
    return replace(
        note, tensors={key: -value if "lora_B" in key else value for key, value in note.tensors.items()}, card={}
    )


def test_what_an_adapter_said_is_its_own(stored: Path, make_base: Callable[..., Base], note: Adapter) -> None:
    first, asked = judged_in(load_base(stored), note)
    assert asked == ALL | OWN
    other, asked = judged_in(load_base(stored), other_note(note))
    assert asked == OWN
    assert other["general"]["kl"] != first["general"]["kl"]
    assert judged_in(load_base(stored), note) == (first, set())
    whole = make_base(seed=8)
    model, asked = judged_in(load_base(stored), whole)
    assert asked == OWN
    assert judged_in(load_base(stored), make_base(seed=8)) == (model, set())
    assert judged_in(load_base(stored), make_base(seed=9))[1] == OWN
    whole.model.to(torch.bfloat16)
    whole.changed()
    assert judged_in(load_base(stored), whole)[1] == OWN


@pytest.mark.parametrize("side", ["base", "what is judged"])
def test_a_judging_that_is_stopped_goes_on_where_it_was(
    side: str, stored: Path, note: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "said" / "predictions.jsonl"
    given = {"target": ROWS, "general": TEXT, "pairs": PAIRS, "predictions": out}
    options = JudgeOptions.parse({"general": {"window": 32}, "batch": 2, "max_new_tokens": 5})
    asked: list[tuple[str, int]] = []

    def stop(event: dict[str, Any]) -> None:
        if event["phase"] == f"answers of {'the ' if side == 'base' else ''}{side}" and event["done"] >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(load_base(stored), note, **given, options=options, watch=stop)
    assert not out.exists()
    partial = tmp_path / "said" / "predictions.jsonl.partial"
    before = [json.loads(line) for line in partial.read_text().splitlines()]
    mine = [line for line in before if line["side"] == ("base" if side == "base" else "adapter")]
    assert 3 <= len(mine) < 6
    assert {"set", "row", "rows", "side", "prompt", "references", "answer", "finish_reason"} == set(mine[0])
    card = judge(load_base(stored), note, **given, options=options,
                 watch=lambda event: asked.append((event["phase"], event["total"])))  # fmt: skip
    totals = dict(asked)
    assert totals.pop(f"answers of {'the ' if side == 'base' else ''}{side}") == 6 - len(mine)
    assert set(totals) == ({"answers of what is judged"} if side == "base" else set())
    assert not partial.exists()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    known = {(line.get("row"), line["side"]): line.get("answer") for line in lines if line["set"] == "target"}
    assert all(known[line["row"], line["side"]] == line["answer"] for line in before)
    monkeypatch.setenv("POSTIL_HOME", str(tmp_path / "another"))
    whole = judge(load_base(stored), note, **given, options=options)
    assert whole == card
    assert [json.loads(line) for line in out.read_text().splitlines()] == lines


def test_a_line_cut_in_two_by_a_kill_is_asked_again_and_the_rest_is_not(stored: Path, note: Adapter) -> None:
    first, _ = judged_in(load_base(stored), note)
    for file in (cache_directory() / "judged").glob("*.jsonl"):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) - 30])
    totals: dict[str, int] = {}
    options = JudgeOptions.parse({"shots": 1, "general": {"window": 32}})
    given = {"target": ROWS, "pairs": PAIRS, "general": TEXT, "train": TRAIN, "options": options}
    second = judge(load_base(stored), note, **given, watch=lambda e: totals.update({e["phase"]: e["total"]}))
    assert set(totals.values()) == {1}
    assert second.model_dump(exclude={"command"}) == first
    assert judged_in(load_base(stored), note)[1] == set()


def test_a_base_with_an_adapter_merged_into_it_is_not_taken_for_the_base(
    stored: Path, make_base: Callable[..., Base], note: Adapter
) -> None:
    other = make_base(seed=8)
    plain, _ = judged_in(load_base(stored), other)
    files = {file.name for file in (cache_directory() / "judged").iterdir()}
    model = attach(load_base(stored))
    attach(model, note, name="note")
    merge(model, "note")
    merged, asked = judged_in(model, other)
    assert asked == ALL | OWN
    assert (
        merged["general"]["nats"]["measures"]["nats"]["base"] != plain["general"]["nats"]["measures"]["nats"]["base"]
    )
    assert {file.name for file in (cache_directory() / "judged").iterdir()} == files
    assert judged_in(load_base(stored), other) == (plain, set())


def test_changed_code_asks_anew(stored: Path, note: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    judged(load_base(stored), note)
    monkeypatch.setattr(memory, "code_digest", lambda _: "another")
    assert judged_in(load_base(stored), note)[1] == ALL | OWN


def test_the_code_is_all_that_values_come_of(tmp_path: Path) -> None:
    package = Path(memory.__file__).parents[1]
    for folder in ("judging", "kernels", "cli"):
        shutil.copytree(package / folder, tmp_path / "a" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert memory.code_digest(tmp_path / "a") == memory.code_digest(tmp_path / "b")
    for number, (file, same) in enumerate(
        (("cli/words.py", True), ("judging/sets/general.py", False), ("kernels/dense/op.py", False))
    ):
        changed = tmp_path / f"c{number}"
        shutil.copytree(tmp_path / "a", changed)
        with (changed / file).open("a") as handle:
            handle.write("# more")
        assert (memory.code_digest(changed) == memory.code_digest(tmp_path / "a")) is same


def test_what_was_not_used_for_longest_goes_first(
    stored: Path, note: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged(load_base(stored), note, target=None, train=None, options={"shots": 0})
    early = memory.kept()
    for age, file in enumerate(early):
        os.utime(file, (1000 + age, 1000 + age))
    judged(load_base(stored), note)
    sizes = {file: file.stat().st_size for file in memory.kept()}
    assert memory.kept()[: len(early)] == early
    assert memory.bound(sum(sizes.values())) == 0
    assert memory.bound(sum(sizes.values()) - 1) == 1
    assert memory.kept() == list(sizes)[1:]
    judged(
        load_base(stored), note, target=None, train=None, options={"shots": 0}
    )  # used again, and the one gone is new
    assert not set(memory.kept()[: len(sizes) - 2]) & set(early)
    monkeypatch.setattr(memory, "MOST_BYTES", 0)
    judged(load_base(stored), note, options={"fresh": True})
    assert memory.kept() == []


def test_a_base_changed_in_memory_leaves_nothing(stored: Path, note: Adapter) -> None:
    base = load_base(stored)
    base.changed()
    judged(base, note)
    assert not (cache_directory() / "judged").exists()
