"""Row: a request on its way, its tokens so far, and its text as it grows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from postil.engine.request import Answer, FinishReason, Request
from postil.engine.sampler import Choice, generator_of

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how a decoder shows the first bytes of a character


@dataclass(slots=True)
class Row:
    """One request between its prompt and its answer.

    slot: its adapter's slot, -1 for the base. Slots never come again: a row whose adapter was removed finds none.
    """

    request: Request
    prompt: list[int]
    slot: int
    eos: frozenset[int]
    tokenizer: Any
    streams: bool = False
    ids: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason | None = None
    error: str | None = None
    generator: torch.Generator | None = None
    text: str = ""
    given: int = 0  # characters of the text that `piece` gave out

    def __post_init__(self) -> None:
        self.generator = generator_of(self.request)

    @property
    def limit(self) -> int:
        """The most tokens that the sequence can have."""
        return len(self.prompt) + self.request.max_new_tokens

    @property
    def length(self) -> int:
        """The tokens whose keys are stored once the prompt is: all but the newest."""
        return len(self.prompt) + len(self.ids) - 1

    def push(self, choice: Choice | None) -> None:
        """Take the next token, and see whether it was the last; no choice breaks the answer off."""
        if choice is None:
            who = "the base" if self.request.adapter is None else f"the adapter {self.request.adapter!r}"
            self.fail(
                f"{who} gave values that are not finite (NaN or infinite) after {len(self.ids)} tokens of an answer: "
                "its numbers overflow, or are broken; try the base in float32, or train the adapter again"
            )
            return
        self.margins.append(choice.margin)
        if choice.token in self.eos:
            self.finish = "stop"
        else:
            self.ids.append(choice.token)
            if choice.logprob is not None:
                self.logprobs.append(choice.logprob)
            if len(self.ids) >= self.request.max_new_tokens:
                self.finish = "length"
        if self.tokenizer is not None and (self.streams or self.request.stop or self.finish):
            self._read()

    def fail(self, error: str) -> None:
        """Break the answer off, with what there is of it."""
        if self.tokenizer is not None and self.ids:
            self._read()
        self.finish, self.error = "error", error

    def _read(self) -> None:
        self.text = self._decoded(self.ids)
        if self.request.raw:  # after its prompt, as some decoders drop the space before a text's first token
            before = self._decoded(self.prompt[-1:])
            whole = self._decoded([*self.prompt[-1:], *self.ids])
            self.text = whole.removeprefix(before) if whole.startswith(before) else self.text
        found = [at for stop in self.request.stop if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.finish = self.text[: min(found)], "stop"

    def _decoded(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def piece(self) -> str:
        """The text that is new and certain: no half character, nothing that may turn out a stop string."""
        end = len(self.text)
        if self.finish is None:
            settled = self.text.rstrip(UNFINISHED)
            held = (
                size
                for stop in self.request.stop
                for size in range(min(len(stop) - 1, len(settled)), 0, -1)
                if settled.endswith(stop[:size])
            )
            end = len(settled) - max(held, default=0)
        new = self.text[self.given : end]
        self.given = max(self.given, end)
        return new

    def answer(self) -> Answer:
        """The finished row as an Answer."""
        return Answer(
            text=self.text,
            ids=tuple(self.ids),
            adapter=self.request.adapter,
            finish_reason=self.finish or "length",
            prompt_tokens=len(self.prompt),
            margins=tuple(self.margins),
            logprobs=tuple(self.logprobs) if self.request.logprobs else None,
            error=self.error,
        )
