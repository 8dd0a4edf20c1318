"""What a bare base answers to chat prompts, greedily: asked once, kept, and made into samples to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from postil.adapter import AdaptedModel
from postil.data import Sample
from postil.data.messages import check_messages
from postil.data.template import end_of_turn
from postil.engine.engine import Engine, eos_ids
from postil.engine.memory import Memory
from postil.engine.request import Answer, Request, prompt_ids, unbroken
from postil.errors import DataError, RequestError, listed

ANSWER_TOKENS = 48  # of the base's own answer


def conversation(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row {"prompt"} or {"messages"}, and those of {"prompt", "completion"} with the answer at the
    end. Raises DataError, without the place, for anything else."""
    if "messages" in row:
        messages = check_messages(row["messages"])
    elif isinstance(row.get("prompt"), str) and row["prompt"]:
        messages = check_messages([{"role": "user", "content": row["prompt"]}])
        if isinstance(row.get("completion"), str):
            messages += check_messages([{"role": "assistant", "content": row["completion"]}])
    else:
        raise DataError(
            f"a chat row needs `messages` or a `prompt` that is a string and not empty; it has {listed(row)}"
        )
    if messages[-1]["role"] not in ("user", "assistant", "tool"):
        raise DataError("the last message must be the user's, to be answered, or the assistant's answer")
    return messages


def chat_ids(messages: Sequence[Mapping[str, Any]], number: int, tokenizer: Any) -> list[int]:
    """The tokens of a conversation up to where the next answer begins. Raises DataError."""
    try:
        return prompt_ids(Request(messages=messages), number, tokenizer)
    except RequestError as problem:
        raise DataError(str(problem)) from None


def own_answers(
    model: AdaptedModel,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int = ANSWER_TOKENS,
    fresh: bool = False,
    done: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """The bare base's greedy answers to tokenised prompts, of at most `new_tokens` tokens; kept in the user's cache.
    Raises AnswerError where one breaks off.

    done: told how many are there. Raises AnswerError where one broke off: half an answer is nothing to hold to.
    """
    asked = [repr((list(ids), new_tokens)).encode() for ids in prompts]

    def make() -> dict[str, Any]:
        requests = [Request(ids=ids, max_new_tokens=_room(model, ids, new_tokens)) for ids in prompts]
        with Engine(model) as engine:
            found = unbroken(engine.run(requests, done))
        return {"answers": [(one.text, one.ids, one.finish_reason, one.prompt_tokens) for one in found]}

    def read(kept: Any) -> list[Answer]:
        found = [
            Answer(text, tuple(ids), None, finish, tokens, margins=())
            for text, ids, finish, tokens in kept["answers"]
        ]
        if len(found) != len(prompts):
            raise ValueError("there is not one answer for each prompt")
        return found

    memory = Memory(None if model.merged else model.base, fresh=fresh)
    return memory("own answers", [repr(sorted(eos_ids(model))).encode(), *asked], make, read)


def _room(model: AdaptedModel, ids: Sequence[int], new_tokens: int) -> int:
    context = model.base.context
    return new_tokens if context is None else min(new_tokens, context - len(ids))


def answered_samples(
    prompts: Sequence[Sequence[int]], answers: Sequence[Answer], tokenizer: Any, rows: Sequence[int]
) -> list[Sample]:
    """A sample a prompt: its tokens and the answer's, loss on the answer and on the token that ends it."""
    end = end_of_turn(tokenizer)
    end = tokenizer.eos_token_id if end is None else end
    out = []
    for ids, answer, row in zip(prompts, answers, rows, strict=True):
        closed = [end] if answer.finish_reason == "stop" and end is not None else []
        whole = np.array([*ids, *answer.ids, *closed], dtype=np.int32)
        weights = np.ones(len(whole), dtype=np.float32)
        weights[: len(ids)] = 0
        out.append(Sample(whole, weights, row))
    return out
