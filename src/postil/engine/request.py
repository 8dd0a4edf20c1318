"""Request and Answer: what is asked of the engine and what it gives back, and the checks between."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from postil.data import encode_prompt, render
from postil.errors import AnswerError, DataError, RequestError, listed, nearest

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and how to answer it: exactly one of `ids`, `prompt` and `messages`.

    prompt: the user's turn of a conversation, or with `raw` plain text to be continued. messages: a
    conversation (with `tools` that may be called). adapter: a name, or None for the bare base.
    temperature 0 is greedy; top_k 0 and top_p 1 keep every token; `seed` alone decides a sampled answer.
    stop: the answer ends before the first of these strings. logprobs: give each token's log-probability. label:
    what errors call it, such as a file and line (empty: its number among those asked together). An answer that
    breaks off on its way (its Answer's `error`) breaks off alone: others asked with it never notice.
    """

    ids: Sequence[int] | None = None
    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    adapter: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: tuple[str, ...] = ()
    raw: bool = False
    logprobs: bool = False
    label: str = ""

    def called(self, number: int) -> str:
        """What an error calls it: its label, or its number."""
        return self.label or f"request {number}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request got.

    text: without the end-of-sequence token and without a stop string (empty where there is no tokenizer).
    ids: the new tokens, without the end-of-sequence token. finish_reason: "stop" (the model ended, or a
    stop string came), "length", or "error": it broke off, `error` says in a sentence why (no next token, as the
    values were not finite; its adapter was removed meanwhile), and text and ids are what there was until then.
    margins: per decision the difference of the two best logits, the decision to end included. logprobs: natural
    log-probabilities of `ids` under the model (temperature 1), or None.
    """

    text: str
    ids: tuple[int, ...]
    adapter: str | None
    finish_reason: FinishReason
    prompt_tokens: int
    margins: tuple[float, ...]
    logprobs: tuple[float, ...] | None = None
    error: str | None = None


def unbroken(answers: Sequence[Answer]) -> list[Answer]:
    """The same answers. Raises AnswerError where one broke off: how many did, and why the first."""
    broken = [answer.error for answer in answers if answer.error is not None]
    if broken:
        rest = f" ({len(broken)} of {len(answers)} answers broke off)" if len(answers) > 1 else ""
        raise AnswerError(f"{broken[0]}{rest}")
    return list(answers)


def prompt_ids(request: Request, number: int, tokenizer: Any) -> list[int]:
    """The prompt's token ids. Raises RequestError naming the request by its number (from 1)."""
    given = [name for name in ("ids", "prompt", "messages") if getattr(request, name) is not None]
    if len(given) != 1:
        raise RequestError(f"{request.called(number)} gives {listed(given)}: give one of ids, prompt and messages")
    if request.tools and (request.raw or request.ids is not None):
        raise RequestError(
            f"{request.called(number)} has tools, which only a conversation can have: leave raw and ids out"
        )
    if request.ids is not None:
        ids = [int(token) for token in request.ids]
    elif tokenizer is None:
        raise RequestError(f"{request.called(number)} is text, but the base has no tokenizer: give ids")
    elif request.prompt == "" or (request.messages is not None and not request.messages):
        raise RequestError(f"{request.called(number)} has an empty prompt: give at least one token")
    else:
        try:
            ids = encode_prompt(_text_of(request, number, tokenizer), tokenizer)
        except DataError as problem:
            raise RequestError(f"{request.called(number)}: {problem}") from problem
    if not ids:
        raise RequestError(f"{request.called(number)} has an empty prompt: give at least one token")
    return ids


def _text_of(request: Request, number: int, tokenizer: Any) -> str:
    if request.raw and request.prompt is not None:
        return request.prompt
    if request.raw:
        raise RequestError(f"{request.called(number)} is a conversation and raw: give a prompt, or leave raw out")
    if not tokenizer.chat_template:
        raise RequestError(
            f"{request.called(number)}: the base has no chat template; give plain text to go on from, "
            "with raw=True (--raw)"
        )
    messages = request.messages or [{"role": "user", "content": request.prompt}]
    return render(messages, tokenizer, tools=request.tools, add_generation_prompt=True)


def check_request(
    request: Request,
    number: int,
    ids: Sequence[int],
    *,
    adapters: Iterable[str],
    vocabulary: int,
    context: int | None,
) -> None:
    """Raise RequestError where a setting is impossible, the adapter unknown or the context too short."""
    known = list(adapters)
    if request.adapter is not None and request.adapter not in known:
        near = nearest(request.adapter, known)
        raise RequestError(
            f"{request.called(number)}: no adapter {request.adapter!r}{near}; there are: {listed(known)}"
        )
    faults = {
        "max_new_tokens must be at least 1": request.max_new_tokens < 1,
        "temperature must be a number from 0": not 0 <= request.temperature < float("inf"),
        "top_p must lie above 0 and not above 1": not 0 < request.top_p <= 1,
        "top_k must be at least 0": request.top_k < 0,
        "seed must lie in 0 .. 2^63-1": not 0 <= request.seed < 2**63,
        "stop must be a tuple of strings that are not empty": isinstance(request.stop, str) or "" in request.stop,
    }
    for fault, present in faults.items():
        if present:
            raise RequestError(f"{request.called(number)}: {fault}")
    outside = next((token for token in ids if not 0 <= token < vocabulary), None)
    if outside is not None:
        raise RequestError(
            f"{request.called(number)}: token id {outside} lies outside the vocabulary of {vocabulary}"
        )
    if context is not None and len(ids) + request.max_new_tokens > context:
        raise RequestError(
            f"{request.called(number)}: {len(ids)} prompt tokens and {request.max_new_tokens} new ones do not fit "
            f"the base's context of {context}; shorten the prompt or lower max_new_tokens"
        )
