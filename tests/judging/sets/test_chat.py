"""Chat prompts: read, answered by the base once, and what an adapter makes of them, by hand and by its answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from byte_base import byte_base
from postil.adapter import AdaptedModel, LoraConfig, attach, detach
from postil.base import Base
from postil.data import load_data
from postil.engine import Engine, Request
from postil.errors import DataError, JudgeError
from postil.judging.asking.likelihoods import row_losses
from postil.judging.card.build import Draw
from postil.judging.judge import judge
from postil.judging.options import JudgeOptions
from postil.judging.sets.chat import SHORT, START, Chat, ask, base_measures, chat_part, measure_chat, read_chat
from postil.training import train

PROMPTS = [
    {"prompt": f"{word}?", "kind": "ab"[n % 2]} for n, word in enumerate(["one", "two", "three", "four", "cat"])
]


def asked(model: AdaptedModel, rows: Any = PROMPTS, new_tokens: int = 14) -> Chat:
    prompts = read_chat(rows, model.base, new_tokens)
    assert prompts is not None
    return ask(prompts, model, new_tokens, fresh=False, done=lambda _: None)


def stubborn() -> tuple[AdaptedModel, str]:
    """A base with an adapter that says the same word to everything."""
    model = attach(byte_base())
    attach(model, LoraConfig(r=8, target_modules="all-linear"), name="note", seed=1)
    rows = [{"prompt": f"row {n} {chr(97 + n)}", "completion": "NO"} for n in range(24)]
    train(model, load_data(rows, model.base), name="note", learning_rate=1e-2, epochs=20)
    model.activate()
    return model, "note"


def test_an_adapter_that_says_one_word_to_everything_is_seen() -> None:
    model, name = stubborn()
    chat = asked(model)
    bare = base_measures(chat, row_losses(model, chat.samples, None))
    mine = measure_chat(chat, model, name)
    part = chat_part(chat, bare, mine, Draw(), (), 10)
    values = {key: (m.base.value, m.adapter.value) for key, m in part.measures.items()}
    assert values["same_start"] == (100.0, 0.0)
    assert values["alike"][1] == 100.0
    assert values["alike"][0] < 100.0
    assert values["nats"][1] > values["nats"][0] + 1
    assert values["kl"][0] == 0
    assert values["kl"][1] > 1
    assert part.main == "nats"
    assert part.data.rows == 5
    assert part.data.tokens == sum(sample.target_tokens for sample in chat.samples)


def test_nats_and_kl_are_those_by_hand(model: AdaptedModel, log_probs: Callable[..., torch.Tensor]) -> None:
    chat = asked(model)
    found = measure_chat(chat, model, "note")
    for n, sample in enumerate(chat.samples):
        rows = np.flatnonzero(sample.weights) - 1
        words = torch.from_numpy(sample.ids[rows + 1].astype(np.int64))
        p, q = log_probs(model, sample.ids)[rows], log_probs(model, sample.ids, {"note": 1.0})[rows]
        nats = -q.gather(1, words[:, None]).sum()
        divergence = (p.exp() * (p - q)).sum()
        assert found["nats"][n].tolist() == [pytest.approx(float(nats), rel=1e-4), len(rows)]
        assert found["kl"][n].tolist() == [pytest.approx(float(divergence), rel=1e-3, abs=1e-5), len(rows)]


def test_how_answers_begin_is_what_the_engine_answers(model: AdaptedModel) -> None:
    chat = asked(model)
    found = measure_chat(chat, model, "note")
    with Engine(model) as engine:
        mine = engine.run([Request(ids=ids, adapter="note", max_new_tokens=SHORT) for ids in chat.prompts.ids])
    same = [100.0 * (one.ids[:START] == other.ids[:START]) for one, other in zip(mine, chat.answers, strict=True)]
    assert found["same_start"][:, 0].tolist() == same
    alike = [100.0 * ([other.ids for other in mine].count(one.ids) > 1) for one in mine]
    assert found["alike"][:, 0].tolist() == alike


def test_the_base_is_itself_and_an_untouched_adapter_changes_nothing(base: Base) -> None:
    model = attach(base, LoraConfig(r=4), name="new")
    chat = asked(model)
    bare = base_measures(chat, row_losses(model, chat.samples, None))
    mine = measure_chat(chat, model, "new")
    for key in ("same_start", "alike"):
        assert mine[key].tolist() == bare[key].tolist()
    assert mine["nats"] == pytest.approx(bare["nats"], abs=1e-4)
    assert mine["kl"][:, 0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, START, SHORT - 4])
def test_answers_that_are_cut_short_are_compared_as_long_as_they_are(base: Base, tokens: int) -> None:
    """An adapter that changes nothing begins as the base does and is no more alike, however short answers are."""
    model = attach(base, LoraConfig(r=4), name="new")
    chat = asked(model, new_tokens=tokens)
    assert max(len(answer.ids) for answer in chat.answers) == tokens
    bare, mine = base_measures(chat, row_losses(model, chat.samples, None)), measure_chat(chat, model, "new")
    for key in ("same_start", "alike"):
        assert mine[key].tolist() == bare[key].tolist()


def test_a_whole_model_is_compared_with_the_base_beside_it(model: AdaptedModel) -> None:
    other = attach(byte_base(seed=8))
    chat = asked(model)
    found = measure_chat(chat, other, None, model)
    assert found["kl"][:, 0].min() > 0.1
    with Engine(other) as engine:
        mine = engine.run([Request(ids=ids, max_new_tokens=SHORT) for ids in chat.prompts.ids])
    same = [100.0 * (one.ids[:START] == theirs.ids[:START]) for one, theirs in zip(mine, chat.answers, strict=True)]
    assert found["same_start"][:, 0].tolist() == same


def test_slices_of_the_prompts(model: AdaptedModel) -> None:
    chat = asked(model)
    bare = base_measures(chat, row_losses(model, chat.samples, None))
    part = chat_part(chat, bare, measure_chat(chat, model, "note"), Draw(), ("kind",), 2)
    assert set(part.slices["kind"]) == {"a", "b"}


def test_an_answer_that_a_row_brings_is_left_out(base: Base) -> None:
    rows = [{"messages": [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "1"}]}]
    given, plain = (read_chat(one, base, 8) for one in (rows, [{"prompt": "one?"}]))
    assert given is not None
    assert plain is not None
    assert given.ids == plain.ids


def test_too_long_prompts_are_told(base: Base) -> None:
    found = read_chat([*PROMPTS, {"prompt": "x" * 300}], base, 8)
    assert found is not None
    assert len(found.ids) == 5
    assert found.notes == ("the given rows: 1 prompts are left out, too long (rows 6)",)
    with pytest.raises(DataError, match="no prompt fits"):
        read_chat([{"prompt": "x" * 300}], base, 8)


def test_a_bad_row_is_named(base: Base, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*PROMPTS, {"text": "no"}]))
    with pytest.raises(DataError, match=r"chat.jsonl:6: .*needs `messages` or a `prompt`"):
        read_chat(path, base, 8)


def test_a_base_without_a_template_has_no_chat_and_says_so() -> None:
    bare = byte_base(template=None)
    assert read_chat("shipped", bare, 8) is None
    with pytest.raises(DataError, match="no chat template"):
        read_chat(PROMPTS, bare, 8)
    model = attach(bare, LoraConfig(r=4), name="note")
    card = judge(model, "note", general=[{"text": "some text to measure on"}], options=JudgeOptions(resamples=100))
    assert "chat" not in card.general
    assert "no chat is measured: the base has no chat template" in card.notes


def test_the_card_holds_the_part_and_the_scope(model: AdaptedModel) -> None:
    options = JudgeOptions(scope="task", resamples=100)
    card = judge(model, "note", general=None, chat=PROMPTS, options=options)
    assert card.scope == "task"
    assert card.find("general.chat").metric == "nats"
    assert card.find("general.chat.alike").better == "lower"
    assert "--scope task" in card.command
    assert "--general none" in card.command
    assert "--chat ROWS" in card.command
    with pytest.raises(JudgeError, match=r"general\.chat\.alik"):
        judge(model, "note", general=None, chat=PROMPTS, gate="general.chat.alik < 5")


def test_prompts_that_were_trained_on_are_counted() -> None:
    base = byte_base()
    model = attach(base, LoraConfig(r=2), name="note")
    learned = [{"prompt": f"{word}?", "completion": "NO"} for word in ("one", "two", "nine")]
    adapter = train(model, load_data(learned, base), name="note", steps=1, kl_weight=0.0)
    assert adapter is not None
    detach(model)
    answered = {"messages": [{"role": "user", "content": "nine?"}, {"role": "assistant", "content": "9"}]}
    chats = [*PROMPTS, answered]
    card = judge(base, adapter, general=None, chat=chats, options=JudgeOptions(resamples=100), keep=False)
    assert card.contamination is not None
    assert (card.contamination.general, card.contamination.general_rows) == (3, 6)
    assert any("3 of 6 general rows were trained on" in note for note in card.notes)
    adapter.card["seen"]["trained"] = 3
    phases: list[Any] = []
    with pytest.raises(JudgeError, match="`seen` cannot be read"):
        judge(base, adapter, general=None, chat=chats, watch=phases.append, keep=False)
    assert phases == []  # said before the work


def test_an_answer_that_breaks_off_is_none_to_compare() -> None:
    model = attach(byte_base(), LoraConfig(r=4), name="note")
    chat = asked(model)
    model.resident("note").flat.fill_(3e38)
    with pytest.raises(JudgeError, match=r"chat answers of what is judged: .*not finite"):
        measure_chat(chat, model, "note")


def test_how_many_tokens_are_looked_at_defines_the_measures(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def definition(**general: Any) -> str:
        options = JudgeOptions.parse({"resamples": 100, "general": general})
        card = judge(model, "note", general=None, chat=PROMPTS, options=options, keep=False)
        return card.general["chat"].measures["alike"].definition

    found = [definition(), definition(chat_tokens=20)]
    for name in ("START", "SHORT"):
        monkeypatch.setattr(f"postil.judging.judge.{name}", 5)
        found.append(definition())
    assert len(set(found)) == 4
    assert found[0] == (monkeypatch.undo(), definition())[1]
