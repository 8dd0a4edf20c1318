"""Texts as tokens with a loss weight each: tokenised once, whole, targets found by character offsets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from postil.data.formats import Chat, Pair, Text
from postil.data.messages import Message, calls_of
from postil.data.packs import Sample
from postil.data.template import call_line, knows_tools, render_checked, template_source
from postil.errors import DataError

_BATCH = 512  # texts given to the tokenizer at once


@dataclass(frozen=True, slots=True)
class Draft:
    """A row as text: spans are (first character, end, loss weight); `close` adds the end of sequence."""

    row: int
    text: str
    spans: tuple[tuple[int, int, float], ...]
    close: bool

    @property
    def question(self) -> bytes:
        """A digest of the text before the last answer; empty where there is none, as in a running text."""
        before = self.text[: self.spans[-1][0]] if self.spans else ""
        return hashlib.blake2b(before.encode(), digest_size=16).digest() if before else b""


@dataclass(slots=True)
class Tally:
    """What became of the rows while they were encoded: numbers of rows, in order."""

    truncated: list[int] = field(default_factory=list)
    split: list[int] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)
    no_target: list[int] = field(default_factory=list)
    straddled: list[int] = field(default_factory=list)
    no_stop: list[int] = field(default_factory=list)


def draft_pair(row: int, pair: Pair, separator: str) -> Draft:
    """Prompt, separator, completion, end of sequence; loss on the completion and the end."""
    start = len(pair.prompt) + len(separator)
    text = pair.prompt + separator + pair.completion
    return _draft(row, text, ((start, len(text), 1.0),), close=True)


def draft_text(row: int, text: Text) -> Draft:
    """The text and end of sequence, all with loss."""
    return _draft(row, text.text, ((0, len(text.text), 1.0),), close=True)


def draft_chat(row: int, chat: Chat, tokenizer: Any, learn: Literal["all", "last", "weight"]) -> Draft:
    """The rendered conversation, with loss on the chosen assistant turns up to their end-of-turn mark.

    A turn is the text between render(messages before it, generation prompt) and render(messages up to it),
    which must both be prefixes of the whole. Raises DataError naming the turn where they are not, or where
    the template leaves out a turn's tool calls.
    """
    messages = chat.messages
    whole = render_checked(messages, tokenizer, chat.tools, False)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if learn == "last":
        turns = turns[-1:]
    spans = []
    for index in turns:
        weight = messages[index].get("weight", 1.0) if learn == "weight" else 1.0
        if weight > 0:
            start, end = _turn_span(chat, index, whole, tokenizer)
            _check_calls(messages[index], index + 1, whole[start:end], chat, tokenizer)
            spans.append((start, end, float(weight)))
    return _draft(row, whole, tuple(spans), close=False)


def _draft(row: int, text: str, spans: tuple[tuple[int, int, float], ...], close: bool) -> Draft:
    check_text(text)
    return Draft(row, text, spans, close)


def check_text(text: str) -> None:
    """Raise DataError for half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise DataError(f"the text holds half a surrogate pair ({text[problem.start]!a}), which is no text") from None


def _turn_span(chat: Chat, index: int, whole: str, tokenizer: Any) -> tuple[int, int]:
    """First and end character of an assistant turn, without white space after its end-of-turn mark."""
    messages, turn = chat.messages, f"message {index + 1} (assistant)"
    if index == 0 and chat.tools is None:
        raise DataError(
            f"{turn} opens the conversation, so no prompt leads to it; put a user turn before it, or learn "
            "other turns only (learn: last, or weight 0 with learn: weight)"
        )
    before = render_checked(messages[:index], tokenizer, chat.tools, True)
    last = index == len(messages) - 1
    upto = whole if last else render_checked(messages[: index + 1], tokenizer, chat.tools, False)
    if not whole.startswith(upto):
        upto = _without_end(upto, whole, tokenizer)
    if not whole.startswith(upto):
        raise DataError(
            f"{turn}: the chat template prints this turn differently once more messages follow, so what "
            "would be learned is not what will be generated; learn the last turn only (learn: last), make "
            "one row an answer, or give the turn weight 0 (learn: weight)"
        )
    if not whole.startswith(before):
        raise DataError(
            f"{turn}: the chat template's generation prompt is not how it begins this turn, so what would "
            "be learned is not what will be generated; "
            + ("use another chat template" if last else "learn the last turn only (learn: last)")
        )
    return len(before), max(len(before), len(upto.rstrip()))


def _without_end(upto: str, whole: str, tokenizer: Any) -> str:
    """`upto` without the special tokens that end a conversation and no turn (Phi-3's end of text), where `whole`
    goes on with more messages instead; as given where more than these differs."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    rest = upto
    while not whole.startswith(rest):
        bare = rest.rstrip()
        found = next((one for one in special if bare.endswith(one)), None)
        if found is None and bare == rest:
            return upto
        rest = bare if found is None or whole.startswith(bare) else bare.removesuffix(found)
    return rest


def _check_calls(message: Message, number: int, target: str, chat: Chat, tokenizer: Any) -> None:
    """DataError where a learned turn does not show its tool calls."""
    native = knows_tools(template_source(tokenizer, chat.tools)) if message.get("tool_calls") else False
    for call in calls_of(message):
        if native:
            shown = call["name"] in target and all(key in target for key in call["arguments"])
        else:
            shown = call_line(call["name"], call["arguments"]) in target
        if not shown:
            raise DataError(
                f"message {number} (assistant): the chat template leaves out its call of {call['name']!r}, "
                "so the call would not be learned; use a template that prints tool_calls"
            )


def leading_ids(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer itself puts before a text (BOS, or none)."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


def encode_prompt(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a rendered conversation or raw prompt, as in training: one BOS, no end of sequence.

    Raises DataError for what UTF-8 cannot hold.
    """
    check_text(text)
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    leading = leading_ids(tokenizer)
    return ids if ids[: len(leading)] == leading else leading + ids


def _offset_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer, or a copy of it whose offsets are not trimmed of white space (the ids are the same).

    With trimmed offsets, a token that begins with the space before a completion would seem to begin with it.
    """
    from transformers import PreTrainedTokenizerFast

    processor = tokenizer.backend_tokenizer.post_processor
    if processor is None or b'"trim_offsets":true' not in processor.__getstate__().replace(b" ", b""):
        return tokenizer
    copy = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    copy.post_processor = None
    return PreTrainedTokenizerFast(tokenizer_object=copy)


def encode(
    drafts: Sequence[Draft],
    tokenizer: Any,
    *,
    limit: int | None,
    too_long: Literal["drop", "truncate", "split", "error"],
    tally: Tally,
) -> list[Sample]:
    """Samples of at most `limit` tokens, each with a target; `tally` gets the rows that were cut or left out.

    A token is a target when its first character lies in a span: one that begins before the border is not.
    Raises DataError where a draft must be closed and the tokenizer has no end-of-sequence token.
    """
    eos = tokenizer.eos_token_id
    if eos is None and any(draft.close for draft in drafts):
        raise DataError("the base's tokenizer names no end-of-sequence token, so an answer could not learn to end")
    leading = leading_ids(tokenizer)
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    samples: list[Sample] = []
    for draft, ids, weights in _tokenise(drafts, tokenizer, leading, eos, tally):
        if not draft.close and weights.any() and int(ids[np.flatnonzero(weights)[-1]]) not in special:
            tally.no_stop.append(draft.row)
        truncated = False
        if limit is not None and len(ids) > limit:
            if too_long == "split":
                tally.split.append(draft.row)
                samples.extend(_split(ids, weights, draft.row, limit, len(leading)))
                continue
            if too_long != "truncate":
                tally.too_long.append(draft.row)
                continue
            ids, weights, truncated = ids[:limit], weights[:limit], True
        if not weights.any():
            tally.no_target.append(draft.row)
            continue
        if truncated:
            tally.truncated.append(draft.row)
        samples.append(Sample(ids, weights, draft.row, truncated, draft.question))
    return samples


def _tokenise(
    drafts: Sequence[Draft], tokenizer: Any, leading: list[int], eos: int | None, tally: Tally
) -> Iterator[tuple[Draft, NDArray[np.int32], NDArray[np.float32]]]:
    with_offsets = _offset_tokenizer(tokenizer)
    for first in range(0, len(drafts), _BATCH):
        batch = drafts[first : first + _BATCH]
        encoded = with_offsets(
            [draft.text for draft in batch],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        for draft, plain, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            before = [] if plain[: len(leading)] == leading else leading
            after = [eos] if draft.close and plain[-1:] != [eos] else []
            ids = np.array([*before, *plain, *after], dtype=np.int32)
            weights = np.zeros(len(ids), dtype=np.float32)
            inner = weights[len(before) : len(before) + len(plain)]
            spans = np.array(offsets, dtype=np.int64).reshape(-1, 2)
            starts, ends = spans[:, 0], spans[:, 1]
            for start, end, weight in draft.spans:
                inner[(starts >= start) & (starts < end)] = weight
                if ((starts < start) & (ends > start)).any():
                    tally.straddled.append(draft.row)
            if after:
                weights[-1] = 1.0
            weights[:1] = 0.0
            yield draft, ids, weights


def _split(ids: NDArray[np.int32], weights: NDArray[np.float32], row: int, limit: int, leading: int) -> list[Sample]:
    """Pieces of at most `limit` tokens: every target is learned once.

    Every piece begins with the tokenizer's leading tokens, where it has some; a later piece then has, masked,
    the last token of the piece before it, where there is room. Raises DataError where not even one token has any.
    """
    room = limit - leading
    if room < 1:
        raise DataError(
            f"a piece of {limit} tokens holds the tokenizer's {leading} leading ones and nothing to learn; give a "
            f"max_length of {leading + 2} at least"
        )
    head = ids[:leading]
    pieces = []
    start = leading
    while start < len(ids):
        before = ids[start - 1 : start] if start > leading and room > 1 else ids[:0]
        end = start + room - len(before)
        piece = np.concatenate([head, before, ids[start:end]])
        weight = np.concatenate([np.zeros(leading + len(before), dtype=np.float32), weights[start:end]])
        pieces.append(Sample(piece, weight, row))
        start = end
    return pieces
