"""General rows read for training: running text as documents, chat prompts with the base's own answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from postil.adapter.model import AdaptedModel
from postil.data import DataOptions, Sample, load_data
from postil.data.digests import RowDigests, asked_digest, row_digests, seen_of
from postil.data.encode import Tally, draft_chat, encode
from postil.data.formats import Chat, Text
from postil.data.rows import BadRow, Row, Source, open_source
from postil.data.shipped import SHIPPED, shipped_rows
from postil.engine.own_answers import answered_samples, chat_ids, conversation, own_answers
from postil.errors import DataError
from postil.training.general import Documents

ANSWER_TOKENS = 24  # of the base's own answers: what a note spoils, it spoils from the first ones on
From = str | Path | Sequence[Mapping[str, Any]]


def general_documents(
    model: AdaptedModel,
    source: From | Sequence[str | Path] = SHIPPED,
    *,
    skip_bad_lines: bool = False,
    done: Callable[[int, int], None] = lambda done, total: None,
) -> Documents:
    """What a training may watch and hold to. source: rows {"text"}, {"prompt"} or {"messages"}, in one file or list
    or in several files; SHIPPED, also among the files, means the prose and chat prompts that ship with postil.

    A prompt without an answer gets the base's own greedy one (asked once and kept; done: how many of how many are
    there), and so does a conversation that ends with the user; one that ends with an answer keeps it. A base without
    a chat template holds to prose alone; a conversation longer than its context is left out, and counted. Raises
    DataError naming the file and the line.
    """
    texts: list[dict[str, Any]] = []
    asked: list[tuple[int, list[dict[str, Any]]]] = []
    answered: list[tuple[int, list[dict[str, Any]]]] = []
    digest = hashlib.sha256()
    seen: list[RowDigests] = []
    chats = bool(getattr(model.base.tokenizer, "chat_template", None))
    number = 0
    for one in _sources(source):
        shipped = isinstance(one, str) and one == SHIPPED
        rows = [*shipped_rows("hold_prose"), *shipped_rows("hold_chat")] if shipped else one
        opened = open_source(rows)
        for row in opened.rows:
            number += 1
            if isinstance(row, BadRow):
                if skip_bad_lines:
                    continue
                raise DataError(f"{opened.where(row.number)}: {row.error}.")
            digest.update(json.dumps(row.value, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
            if "text" in row.value:
                texts.append(_text(opened, row))
                seen.append(row_digests(Text(texts[-1]["text"])))
            elif chats:
                messages = _messages(opened, row)
                seen.append(_digests(messages))
                (answered if messages[-1]["role"] == "assistant" else asked).append((number, messages))
            elif not shipped:
                raise DataError(
                    f"{opened.where(row.number)}: the base has no chat template, so it can hold to rows of text only"
                )
    prose = load_data(texts, model.base.tokenizer, DataOptions(format="text")).samples if texts else []
    chat = _chats(model, asked, answered, done)
    left_out = len(asked) + len(answered) - len(chat)
    return Documents(tuple(prose), tuple(chat), digest.hexdigest(), seen_of(seen), left_out)


def _digests(messages: list[dict[str, Any]]) -> RowDigests:
    """Those of a conversation, the question that the base is to answer among them."""
    found = row_digests(Chat(messages, None))
    asked = asked_digest(messages) if messages[-1]["role"] != "assistant" else None
    return found if asked is None else found._replace(prompts=(*found.prompts, asked))


def _sources(source: From | Sequence[str | Path]) -> list[From]:
    """Each file, or the rows given."""
    if isinstance(source, str | Path):
        return [source]
    files = [one for one in source if isinstance(one, str | Path)]
    return list(files) if files else [source]  # type: ignore[list-item]


def _text(opened: Source, row: Row) -> dict[str, Any]:
    if not isinstance(row.value["text"], str):
        found = type(row.value["text"]).__name__
        raise DataError(f"{opened.where(row.number)}: `text` must be a string, found {found}.")
    return {"text": row.value["text"]}


def _messages(opened: Source, row: Row) -> list[dict[str, Any]]:
    try:
        return conversation(row.value)
    except DataError as problem:
        raise DataError(f"{opened.where(row.number)}: {problem}") from None


def _chats(
    model: AdaptedModel,
    asked: Sequence[tuple[int, list[dict[str, Any]]]],
    answered: Sequence[tuple[int, list[dict[str, Any]]]],
    done: Callable[[int, int], None],
) -> list[Sample]:
    """Conversations within the base's context, loss on the last answer; in the rows' order."""
    tokenizer, context = model.base.tokenizer, model.base.context
    prompts = [(row, chat_ids(messages, row, tokenizer)) for row, messages in asked]
    prompts = [(row, ids) for row, ids in prompts if context is None or len(ids) < context]
    found: list[Sample] = []
    if prompts:
        rows, ids = zip(*prompts, strict=True)
        answers = own_answers(model, ids, new_tokens=ANSWER_TOKENS, done=lambda count: done(count, len(ids)))
        found += answered_samples(ids, answers, tokenizer, rows)
    drafts = [draft_chat(row, Chat(messages, None), tokenizer, "last") for row, messages in answered]
    found += encode(drafts, tokenizer, limit=context, too_long="drop", tally=Tally()) if drafts else []
    return sorted(found, key=lambda sample: sample.row)
