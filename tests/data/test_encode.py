"""Tokens and loss weights: what is learned, where it begins and ends, one BOS, and what too long does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postil.data import DataOptions, encode_prompt, load_data, render
from postil.data.encode import leading_ids
from postil.data.load import Dataset
from postil.errors import DataError

ASK = {"role": "user", "content": "Where is my order?"}
AGAIN = {"role": "user", "content": "And when?"}
FIRST = {"role": "assistant", "content": "On its way."}
SECOND = {"role": "assistant", "content": "Monday."}
TOOLS = [{"name": "track", "parameters": {}}]
CALLING = {"role": "assistant", "content": "", "tool_calls": [{"name": "track", "arguments": {"id": "Ö 7"}}]}
Learned = Callable[..., list[str]]


def load(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> Dataset:
    return load_data(rows, tokenizer, DataOptions(**options))


def chat(*messages: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


def test_all_turns_with_their_end_marks(chatml: Any, learned: Learned) -> None:
    (sample,) = load([chat(ASK, FIRST, AGAIN, SECOND)], chatml).samples
    assert learned(sample) == ["On its way.<|im_end|>", "Monday.<|im_end|>"]
    assert sample.ids.dtype == np.int32
    assert sample.weights.dtype == np.float32
    assert chatml.decode(sample.ids) == render([ASK, FIRST, AGAIN, SECOND], chatml)


def test_the_newline_after_the_end_mark_is_not_learned(chatml: Any) -> None:
    (sample,) = load([chat(ASK, FIRST)], chatml).samples
    assert chatml.decode(sample.ids[-2:]) == "<|im_end|>\n"
    assert sample.weights[-2:].tolist() == [1.0, 0.0]


def test_the_last_turn(chatml: Any, learned: Learned) -> None:
    (sample,) = load([chat(ASK, FIRST, AGAIN, SECOND)], chatml, learn="last").samples
    assert learned(sample) == ["Monday.<|im_end|>"]


def test_turns_by_weight(chatml: Any) -> None:
    row = chat(ASK, {**FIRST, "weight": 0}, AGAIN, {**SECOND, "weight": 0.5}, AGAIN, FIRST)
    (sample,) = load([row], chatml, learn="weight").samples
    assert sorted(set(sample.weights.tolist())) == [0.0, 0.5, 1.0]
    half = chatml.decode(sample.ids[sample.weights == 0.5])
    assert half == "Monday.<|im_end|>"
    assert chatml.decode(sample.ids[sample.weights == 1]) == "On its way.<|im_end|>"


def test_weights_that_are_ignored_are_said(chatml: Any) -> None:
    report = load([chat(ASK, {**FIRST, "weight": 0})], chatml).report
    assert report.notes == ("1 rows carry message weights, which only learn: weight reads",)


def test_pad_equal_to_eos_masks_nothing(chatml: Any) -> None:
    assert chatml.pad_token_id == chatml.eos_token_id
    (sample,) = load([{"prompt": "p", "completion": "c"}], chatml, format="raw").samples
    assert sample.ids[-1] == chatml.pad_token_id
    assert sample.weights[-1] == 1.0


def test_prompt_and_completion_are_two_turns(chatml: Any) -> None:
    pair = load([{"prompt": "Where is my order?", "completion": "On its way.", "system": "Hi"}], chatml)
    whole = load([chat({"role": "system", "content": "Hi"}, ASK, FIRST)], chatml)
    assert pair.samples[0].ids.tolist() == whole.samples[0].ids.tolist()
    assert pair.samples[0].weights.tolist() == whole.samples[0].weights.tolist()
    assert pair.report.format == "prompt"


def test_raw(chatml: Any, learned: Learned) -> None:
    (sample,) = load([{"prompt": "name[x]", "completion": "The fox."}], chatml, format="raw").samples
    assert chatml.decode(sample.ids) == "name[x]\nThe fox.<|im_end|>"
    assert learned(sample) == ["The fox.<|im_end|>"]
    assert encode_prompt("name[x]\n", chatml) == sample.ids[: len(encode_prompt("name[x]\n", chatml))].tolist()


def test_raw_without_a_template_is_said(make_tokenizer: Callable[..., Any]) -> None:
    dataset = load([{"prompt": "p", "completion": "c"}], make_tokenizer(None))
    assert dataset.report.format == "raw"
    assert dataset.report.template_hash is None
    assert "the base has no chat template" in dataset.report.notes[0]


def test_raw_closes_once(chatml: Any) -> None:
    (sample,) = load([{"prompt": "p", "completion": "c<|im_end|>"}], chatml, format="raw").samples
    assert (sample.ids == chatml.eos_token_id).sum() == 1
    assert sample.weights[-1] == 1


def test_a_token_over_the_border_is_masked_and_said(chatml: Any, learned: Learned) -> None:
    row = {"prompt": "The quick", "completion": "brown fox"}
    dataset = load([row], chatml, format="raw", separator=" ")
    assert learned(dataset.samples[0]) == [" fox<|im_end|>"]  # " brown" begins in the separator
    assert "a token covers both the prompt's end and the target's start" in dataset.report.notes[0]
    assert not load([row], chatml, format="raw").report.notes


def test_trimmed_offsets_change_nothing(make_tokenizer: Callable[..., Any], chatml: Any) -> None:
    trimming = make_tokenizer(trim_offsets=True)
    offsets = trimming("quick brown", return_offsets_mapping=True)["offset_mapping"]
    assert 6 in [start for start, _ in offsets]  # " brown" seems to start after its space
    rows = [{"prompt": "name[x]", "completion": "The fox\n jumps"}]
    for separator in ("\n", " ", "\n\n", "", "\n  "):
        (ours,) = load(rows, trimming, format="raw", separator=separator).samples
        (plain,) = load(rows, chatml, format="raw", separator=separator).samples
        assert ours.ids.tolist() == plain.ids.tolist()
        assert ours.weights.tolist() == plain.weights.tolist()


def test_text_is_learned_whole_but_for_the_first_position(chatml: Any) -> None:
    (sample,) = load([{"text": "The lazy dog."}], chatml).samples
    assert chatml.decode(sample.ids) == "The lazy dog.<|im_end|>"
    assert sample.weights.tolist() == [0.0] + [1.0] * (len(sample.ids) - 1)


def test_one_bos_always(llama2: Any, learned: Learned) -> None:
    bos = llama2.bos_token_id
    assert leading_ids(llama2) == [bos]
    for dataset in (
        load([chat(ASK, FIRST)], llama2),
        load([{"prompt": "p", "completion": "c"}], llama2, format="raw"),
        load([{"prompt": "<s>p", "completion": "c"}], llama2, format="raw"),
        load([{"text": "t"}], llama2),
    ):
        (sample,) = dataset.samples
        assert sample.ids[0] == bos
        assert (sample.ids == bos).sum() == 1
        assert sample.weights[0] == 0
    prompt = render([ASK], llama2, add_generation_prompt=True)
    ids = encode_prompt(prompt, llama2)
    (sample,) = load([chat(ASK, FIRST)], llama2).samples
    assert ids == sample.ids[: len(ids)].tolist()
    assert learned(sample, llama2) == [" On its way. </s>"]
    assert encode_prompt("The fox", llama2)[0] == bos


def test_no_bos_where_the_tokenizer_adds_none(chatml: Any) -> None:
    assert leading_ids(chatml) == []
    (sample,) = load([{"text": "The"}], chatml).samples
    assert chatml.bos_token_id not in sample.ids


def test_a_later_bos_of_the_template_stays(llama2: Any, learned: Learned) -> None:
    (sample,) = load([chat(ASK, FIRST, AGAIN, SECOND)], llama2).samples
    assert llama2.decode(sample.ids) == render([ASK, FIRST, AGAIN, SECOND], llama2)
    assert learned(sample, llama2) == [" On its way. </s>", " Monday. </s>"]


def test_a_rewritten_turn_is_named_with_its_mend(rewriting: Any, learned: Learned) -> None:
    thinking = {"role": "assistant", "content": "<think>hm</think>On its way."}
    row = chat(ASK, thinking, AGAIN, SECOND)
    with pytest.raises(DataError, match=r"row 1: message 2 \(assistant\): .*\(learn: last\)"):
        load([row], rewriting)
    (sample,) = load([row], rewriting, learn="last").samples
    assert learned(sample, rewriting) == ["Monday.<|im_end|>"]
    row["messages"][1]["weight"] = 0
    (sample,) = load([row], rewriting, learn="weight").samples
    assert learned(sample, rewriting) == ["Monday.<|im_end|>"]


def test_an_end_of_text_after_the_whole_conversation_is_no_rewritten_turn(
    ends_once: Any, make_tokenizer: Callable[..., Any], learned: Learned
) -> None:
    row = chat(ASK, FIRST, AGAIN, SECOND)
    (sample,) = load([row], ends_once).samples
    assert learned(sample, ends_once) == ["On its way.<|im_end|>", "Monday.<|im_end|>\n</s>"]
    two = make_tokenizer(ends_once.chat_template.replace("'</s>'", "'</s>\n<s>\n'"))
    (sample,) = load([row], two).samples
    assert learned(sample, two)[0] == "On its way.<|im_end|>"
    other = ends_once.chat_template.replace("'</s>'", "'the end</s>'")  # more than special tokens differs
    with pytest.raises(DataError, match=r"row 1: message 2 \(assistant\): the chat template prints this turn diff"):
        load([row], make_tokenizer(other))


def test_a_generation_prompt_that_is_no_prefix_is_named(make_tokenizer: Callable[..., Any]) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"message 2 \(assistant\): the chat template's generation prompt"):
        load([chat(ASK, FIRST)], make_tokenizer(template))


def test_an_opening_assistant_turn_is_named(chatml: Any, learned: Learned) -> None:
    row = chat(FIRST, ASK, SECOND)
    with pytest.raises(DataError, match=r"message 1 \(assistant\) opens the conversation"):
        load([row], chatml)
    (sample,) = load([row], chatml, learn="last").samples
    assert learned(sample) == ["Monday.<|im_end|>"]


def test_tool_calls_are_learned(chatml: Any, native: Any, llama2: Any, learned: Learned) -> None:
    row = chat(ASK, CALLING, {"role": "tool", "content": "late"}, SECOND, tools=TOOLS)
    line = '<tool_call>{"name": "track", "arguments": {"id": "Ö 7"}}</tool_call>'
    (sample,) = load([row], chatml).samples
    assert learned(sample) == [line + "<|im_end|>", "Monday.<|im_end|>"]
    (sample,) = load([chat(ASK, CALLING, tools=TOOLS)], llama2).samples
    assert learned(sample, llama2) == [f" {line} </s>"]
    (sample,) = load([row], native).samples
    assert learned(sample, native)[0] == 'CALL {"name": "track", "arguments": {"id": "Ö 7"}}<|im_end|>'


def test_a_template_that_leaves_out_calls_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    silent = (
        "{% if tools %}{{ tools }}{% endif %}{% for m in messages %}{{ m['role'] + ':' + m['content'] }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(DataError, match=r"message 2 \(assistant\): the chat template leaves out its call of 'track'"):
        load([chat(ASK, CALLING, tools=TOOLS)], make_tokenizer(silent))


def test_an_answer_without_end_mark_is_said(make_tokenizer: Callable[..., Any]) -> None:
    endless = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    report = load([chat(ASK, FIRST)], make_tokenizer(endless)).report
    assert any("will not learn where to stop" in note for note in report.notes)


def test_no_end_of_sequence_is_an_error(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="names no end-of-sequence token"):
        load([{"text": "x"}], tokenizer)


def test_half_a_surrogate_pair_is_named(chatml: Any) -> None:
    with pytest.raises(DataError, match=r"row 1: the text holds half a surrogate pair \('\\ud800'\)"):
        load([{"text": "a\ud800"}], chatml)


LONG = {"prompt": "The quick brown fox", "completion": "jumps over the lazy dog. " * 5}
SHORT = {"prompt": "p", "completion": "c"}


def test_too_long_is_dropped_and_counted(chatml: Any) -> None:
    dataset = load([SHORT, LONG, SHORT], chatml, format="raw", max_length=20)
    assert [sample.row for sample in dataset.samples] == [1, 3]
    assert dataset.report.too_long_rows == (2,)
    assert dataset.report.dropped_too_long == 1


def test_too_long_is_truncated_and_counted(chatml: Any) -> None:
    whole = load([LONG], chatml, format="raw").samples[0]
    dataset = load([SHORT, LONG], chatml, format="raw", max_length=20, too_long="truncate")
    cut = dataset.samples[1]
    assert cut.truncated
    assert not dataset.samples[0].truncated
    assert cut.ids.tolist() == whole.ids[:20].tolist()
    assert cut.weights.tolist() == whole.weights[:20].tolist()
    assert dataset.report.truncated_rows == (2,)


def test_truncation_that_drops_all_labels_drops_the_row(chatml: Any) -> None:
    dataset = load([SHORT, LONG], chatml, format="raw", max_length=4, too_long="truncate")
    assert [sample.row for sample in dataset.samples] == [1]
    assert dataset.report.no_target_rows == (2,)
    assert dataset.report.truncated_rows == ()
    with pytest.raises(DataError, match=r"no row is left to learn from; .* 1 have no token with loss"):
        load([LONG], chatml, format="raw", max_length=4, too_long="truncate")


def test_rows_without_target_are_named(chatml: Any) -> None:
    rows = [chat(ASK, FIRST), chat(ASK, {**FIRST, "weight": 0})]
    report = load(rows, chatml, learn="weight").report
    assert report.no_target_rows == (2,)
    assert "1 row without a token to learn, left out: 2" in report.lines()


def test_too_long_can_be_an_error(chatml: Any) -> None:
    with pytest.raises(DataError, match=r"1 rows are longer than 20 tokens \(rows 2\)"):
        load([SHORT, LONG], chatml, format="raw", max_length=20, too_long="error")


def test_split_is_for_text_only(chatml: Any) -> None:
    with pytest.raises(DataError, match="too_long: split is for text rows only"):
        load([LONG], chatml, format="raw", too_long="split")


@given(words=st.integers(1, 60), limit=st.integers(2, 25), bos=st.booleans())
def test_split_learns_every_token_once(chatml: Any, llama2: Any, words: int, limit: int, bos: bool) -> None:
    tokenizer = llama2 if bos else chatml
    rows = [{"text": "The fox " * words}]
    (whole,) = load(rows, tokenizer).samples
    pieces = load(rows, tokenizer, max_length=limit, too_long="split").samples
    assert all(2 <= len(piece.ids) <= limit for piece in pieces)
    assert all(piece.row == 1 and piece.weights[0] == 0 for piece in pieces)
    targets = [token for piece in pieces for token in piece.ids[piece.weights > 0].tolist()]
    assert targets == whole.ids[whole.weights > 0].tolist()
    assert all(piece.ids[0] == tokenizer.bos_token_id for piece in pieces) == bos


def test_a_piece_without_room_for_a_target_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    from tokenizers import processors

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> </s> $A", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    with pytest.raises(DataError, match="a piece of 2 tokens holds the tokenizer's 2 leading ones and nothing to"):
        load([{"text": "The fox"}], tokenizer, max_length=2, too_long="split")
    pieces = load([{"text": "The fox"}], tokenizer, max_length=3, too_long="split").samples
    assert [len(piece.ids) for piece in pieces] == [3] * len(pieces)


_text = st.text(min_size=1, max_size=30).filter(lambda text: bool(text.strip()) and "<|" not in text)


@given(st.lists(_text, min_size=2, max_size=6))
def test_learned_text_is_the_answers(chatml: Any, learned: Learned, contents: list[str]) -> None:
    contents = contents[: len(contents) // 2 * 2]
    messages = [
        {"role": "assistant" if number % 2 else "user", "content": content} for number, content in enumerate(contents)
    ]
    (sample,) = load([chat(*messages)], chatml).samples
    shown = learned(sample)
    assert len(shown) == len(contents) // 2
    for text, content in zip(shown, contents[1::2], strict=True):
        # a token may join the newline before an answer with white space at its start
        assert f"{content}<|im_end|>".endswith(text)
        assert text.strip().startswith(content.strip()[:1])
