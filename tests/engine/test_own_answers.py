"""The base's own answers: greedy, of the bare base whatever is resident, kept, and samples that learn them whole."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from byte_base import EOS, byte_base
from postil.adapter import LoraConfig, attach
from postil.base import load_base
from postil.engine import Answer, Engine, Request
from postil.engine.own_answers import answered_samples, chat_ids, conversation, own_answers
from postil.errors import AnswerError, DataError

ROWS = [{"prompt": "one?"}, {"messages": [{"role": "user", "content": "two, please"}]}, {"prompt": "3"}]


def prompts(tokenizer: object) -> list[list[int]]:
    return [chat_ids(conversation(row), n, tokenizer) for n, row in enumerate(ROWS, 1)]


def test_they_are_the_bare_bases_greedy_answers_whatever_is_active() -> None:
    base = byte_base()
    ids = prompts(base.tokenizer)
    with Engine(base) as engine:
        wanted = engine.run([Request(ids=one, max_new_tokens=9) for one in ids])
    model = attach(base, LoraConfig(r=4), name="note")
    model.resident("note").flat.normal_(generator=torch.Generator().manual_seed(1))
    assert model.active == {"note": 1.0}
    told: list[int] = []
    found = own_answers(model, ids, new_tokens=9, done=told.append)
    assert [one.ids for one in found] == [one.ids for one in wanted]
    assert told[-1] == 3
    assert model.active == {"note": 1.0}


def test_an_answer_that_breaks_off_is_no_answer() -> None:
    """As a sample it would have no target, and the prompt be left out without a word."""
    base = byte_base()
    ids = prompts(base.tokenizer)
    three = torch.tensor(sorted({*ids[2]} - {*ids[0], *ids[1]}))

    def poison(_module: object, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        return out.masked_fill(torch.isin(given[0], three)[..., None], float("nan"))

    base.model.get_input_embeddings().register_forward_hook(poison)
    with pytest.raises(AnswerError, match=r"the base gave values that are not finite.*answers broke off\)"):
        own_answers(attach(base), ids, new_tokens=3)


def test_they_are_asked_once_of_a_base_from_files(tmp_path: Path) -> None:
    made = byte_base()
    made.model.save_pretrained(tmp_path / "base")
    made.tokenizer.save_pretrained(tmp_path / "base")

    def asked(new_tokens: int = 5, fresh: bool = False) -> tuple[list[Answer], bool]:
        model = attach(load_base(tmp_path / "base"))
        told: list[int] = []
        found = own_answers(
            model, prompts(model.base.tokenizer), new_tokens=new_tokens, fresh=fresh, done=told.append
        )
        return found, bool(told)

    first, ran = asked()
    assert ran
    again, ran = asked()
    assert not ran
    assert [(a.text, a.ids, a.finish_reason) for a in again] == [(a.text, a.ids, a.finish_reason) for a in first]
    assert asked(new_tokens=6)[1]
    assert asked(fresh=True)[1]


def test_a_sample_learns_the_answer_and_its_end_and_nothing_else() -> None:
    base = byte_base()
    ended = Answer("ab", (97, 98), None, "stop", 3, ())
    cut = Answer("ab", (97, 98), None, "length", 2, ())
    one, other = answered_samples([[1, 2, 3], [4, 5]], [ended, cut], base.tokenizer, [7, 9])
    assert one.ids.tolist() == [1, 2, 3, 97, 98, EOS]
    assert one.weights.tolist() == [0, 0, 0, 1, 1, 1]
    assert other.ids.tolist() == [4, 5, 97, 98]  # it had not ended
    assert other.weights.tolist() == [0, 0, 1, 1]
    assert (one.row, other.row) == (7, 9)


def test_an_answer_has_no_more_room_than_the_context() -> None:
    model = attach(byte_base(context=40))
    ids = list(range(65, 65 + 35))
    (found,) = own_answers(model, [ids], new_tokens=48)
    assert len(found.ids) <= 5


def test_what_rows_may_be() -> None:
    assert conversation({"prompt": "a", "completion": "b"})[-1] == {"role": "assistant", "content": "b"}
    assert [one["role"] for one in conversation({"messages": [{"role": "user", "content": "a"}]})] == ["user"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "a"}, "needs `messages` or a `prompt`"),
        ({"prompt": ""}, "not empty"),
        ({"prompt": 3}, "a string"),
        ({"messages": [{"role": "system", "content": "a"}]}, "the last message must be the user's"),
        ({"messages": []}, "at least one message"),
    ],
)
def test_rows_that_are_none(row: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        conversation(row)


def test_a_prompt_that_the_template_refuses_is_named() -> None:
    base = byte_base(template="{{ raise_exception('no thanks') }}")
    with pytest.raises(DataError, match="no thanks"):
        chat_ids(conversation({"prompt": "a"}), 4, base.tokenizer)


def test_a_base_that_breaks_off_has_no_answers() -> None:
    base = byte_base()
    model = attach(base)
    with torch.no_grad():
        base.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(AnswerError, match="not finite"):
        own_answers(model, prompts(base.tokenizer), new_tokens=4)
