"""Text in and out: chat and plain prompts, streams that join to the text, stop strings, sampling's filters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models

from postil.data import encode_prompt, render
from postil.engine import Engine, Request
from postil.engine.row import Row
from postil.engine.sampler import Choice, draw, generator_of
from postil.errors import RequestError


@pytest.fixture
def engine(make_base: Callable[..., Any], tokenizer: Any) -> Any:
    """An engine on a tiny base with a byte tokenizer."""
    with Engine(make_base("llama", tokenizer)) as made:
        yield made


def row(tokenizer: Any, *stop: str) -> Row:
    """A row that streams."""
    return Row(Request(ids=(1,), stop=stop, max_new_tokens=40), [1], -1, frozenset({257}), tokenizer, True)


def pushed(row: Row, ids: list[int]) -> list[str]:
    """The pieces as these tokens come."""
    pieces = []
    for token in ids:
        row.push(Choice(token, 1.0, None))
        pieces.append(row.piece())
        if row.finish:
            break
    return pieces


@pytest.mark.parametrize("seed", range(5))
def test_pieces_join_to_the_text(seed: int, engine: Engine) -> None:
    request = Request(prompt="Grüße", temperature=1.0, seed=seed, max_new_tokens=40)
    pieces = list(engine.stream(request))
    assert "".join(pieces) == engine.run([request])[0].text
    assert len(pieces) > 3


def test_no_half_character_is_given_out(tokenizer: Any) -> None:
    ids = tokenizer("aé€😀z")["input_ids"]
    assert len(ids) == 1 + 2 + 3 + 4 + 1
    assert pushed(row(tokenizer), [*ids, 257]) == ["a", "", "é", "", "", "€", "", "", "", "😀", "z", ""]


def test_a_stop_string_ends_the_answer_and_is_not_shown(tokenizer: Any) -> None:
    ids = tokenizer("a\nEN\nENDED")["input_ids"]
    made = row(tokenizer, "\nEND")
    assert pushed(made, ids) == ["a", "", "", "", "\nEN", "", "", ""]
    assert made.answer().text == "a\nEN"
    assert made.answer().finish_reason == "stop"


def test_the_end_token_is_not_in_the_text(tokenizer: Any) -> None:
    made = row(tokenizer)
    pushed(made, [*tokenizer("hi")["input_ids"], 257])
    assert (made.answer().text, len(made.answer().ids), len(made.answer().margins)) == ("hi", 2, 3)


def test_an_answer_ends_where_the_template_ends_a_turn(make_base: Callable[..., Any], tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"eos_token": "<|endoftext|>"})
    assert other.eos_token_id == 258
    base = make_base("llama", other)
    base.model.generation_config.eos_token_id = None
    with Engine(base) as engine:
        assert engine.eos == {257, 258}  # ChatML's end of a turn beside the tokenizer's own


def test_a_special_token_stops_as_a_string_does(engine: Engine, tokenizer: Any) -> None:
    ids = tokenizer("Hello")["input_ids"]
    (free,) = engine.run([Request(ids=ids, max_new_tokens=9)])
    special = copy.deepcopy(tokenizer)
    mark = special.convert_ids_to_tokens(free.ids[3])
    special.add_special_tokens({"additional_special_tokens": [mark]})
    engine.model.base.tokenizer = special
    (found,) = engine.run([Request(ids=ids, max_new_tokens=9, stop=(mark,))])
    assert found.ids == free.ids[: free.ids.index(free.ids[3])]
    assert found.finish_reason == "stop"


def test_a_continuation_keeps_the_space_that_it_begins_with() -> None:
    """Some decoders (Llama 2's) drop the space before a text's first token."""
    words = {word: number for number, word in enumerate(("<unk>", "▁is", "▁Paris", "▁", "P"))}
    inner = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    for raw, wanted in ((True, " Paris"), (False, "Paris")):
        made = Row(Request(ids=(1,), raw=raw, max_new_tokens=1), [1], -1, frozenset(), tokenizer)
        made.push(Choice(2, 1.0, None))
        assert made.answer().text == wanted


def test_chat_and_generate(engine: Engine, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    ids = encode_prompt(render(messages, tokenizer, add_generation_prompt=True), tokenizer)
    chat, plain = engine.run(
        [Request(ids=ids, max_new_tokens=9), Request(ids=tokenizer("Hello")["input_ids"], max_new_tokens=9)]
    )
    assert engine.chat("Hello", max_new_tokens=9) == engine.chat(messages, max_new_tokens=9) == chat.text
    assert engine.generate("Hello", max_new_tokens=9) == plain.text != chat.text


def test_bad_texts(engine: Engine) -> None:
    with pytest.raises(RequestError, match="request 1: message"):
        engine.chat([{"role": "nobody", "content": "x"}])
    with pytest.raises(RequestError, match="empty prompt"):
        engine.chat("")
    with pytest.raises(RequestError, match="empty prompt"):
        engine.stream(Request(prompt="", raw=True))
    with pytest.raises(RequestError, match="one of ids, prompt and messages"):
        engine.run([Request(ids=(1,), prompt="x")])


def drawn(logits: list[float], **settings: Any) -> list[int]:
    """How often each token came in 2000 draws."""
    request = Request(**{"ids": (1,), "temperature": 1.0, "seed": 5} | settings)
    generator = generator_of(request)
    assert generator is not None
    counts = [0] * len(logits)
    for _ in range(2000):
        counts[draw(torch.tensor(logits), request, generator)] += 1
    return counts


def test_the_filters_of_sampling() -> None:
    logits = torch.tensor([0.2, 0.5, 0.05, 0.25]).log().tolist()
    free = drawn(logits)
    assert free == pytest.approx([400, 1000, 100, 500], abs=80)
    assert [count > 0 for count in drawn(logits, top_k=2)] == [False, True, False, True]
    assert [count > 0 for count in drawn(logits, top_p=0.6)] == [False, True, False, True]
    assert [count > 0 for count in drawn(logits, top_p=0.01)] == [False, True, False, False]
    assert drawn(logits, temperature=0.01)[1] == 2000
    assert drawn(logits, temperature=100.0) == pytest.approx([500] * 4, abs=80)
