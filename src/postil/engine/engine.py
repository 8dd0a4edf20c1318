"""Engine: one base and its adapters, answering many requests in one changing batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from transformers import PreTrainedModel

from postil.adapter import AdaptedModel, Adapter, attach, detach
from postil.base import Base
from postil.data.template import end_of_turn
from postil.engine.batch import Batch, OneByOne
from postil.engine.request import Answer, Request, check_request, prompt_ids, unbroken
from postil.engine.row import Row
from postil.errors import RequestError


class Engine:
    """A context manager that answers requests with one base, each row with its own adapter or none.

    target: a Base, a transformers model (frozen then), or an AdaptedModel, whose residents are known by their
    names. adapters: more of them, by name. max_batch: the most rows that decode together. Closing takes off
    what the engine attached; the base is then bit for bit as before. Not for several threads at once.
    Raises AdapterError, BaseModelError.
    """

    def __init__(
        self,
        target: Base | PreTrainedModel | AdaptedModel,
        adapters: Mapping[str, Adapter] | None = None,
        *,
        max_batch: int = 32,
    ) -> None:
        if max_batch < 1:
            raise RequestError(f"max_batch is {max_batch}: it must be at least 1")
        self.max_batch = max_batch
        self.closed = False
        self._attached = not isinstance(target, AdaptedModel)
        self._added: list[str] = []
        self.model = attach(target)
        active = dict(self.model.active)
        try:
            for name, adapter in (adapters or {}).items():
                attach(self.model, adapter, name=name)
                self._added.append(name)
        except BaseException:
            self.close()
            raise
        finally:
            self.model.active = active
        self.eos = eos_ids(self.model)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take off what the engine attached. May be called again."""
        if self.closed:
            return
        self.closed = True
        if self._attached:
            detach(self.model)
        else:
            for name in self._added:
                self.model.remove(name)

    @property
    def adapters(self) -> list[str]:
        """The names that a request may give."""
        return list(self.model.residents)

    def run(
        self,
        requests: Sequence[Request],
        done: Callable[[int], None] = lambda _: None,
        finished: Callable[[int, Answer], None] = lambda _, __: None,
    ) -> list[Answer]:
        """Answers in the order of the requests, those that broke off among them (`unbroken` refuses these).
        Raises RequestError before any work is done.

        done: told after each step how many answers are finished. finished: told each answer then, with its place.
        """
        rows = [self._row(request, number) for number, request in enumerate(requests, 1)]
        work = self._work(rows)
        left = dict(enumerate(rows))
        while work.busy:
            work.step()
            for place in [place for place, row in left.items() if row.finish is not None]:
                finished(place, left.pop(place).answer())
            done(len(rows) - len(left))
        return [row.answer() for row in rows]

    def stream(self, request: Request) -> Iterator[str]:
        """The answer's text in pieces as they come; joined, they are the text that `run` gives.

        Raises RequestError at the call itself, not at the first piece, and AnswerError where the answer breaks off.
        """
        if self.model.base.tokenizer is None:
            raise RequestError("the base has no tokenizer, so there is no text to stream: use run")
        row = self._row(request, 1, streams=True)
        return self._pieces(row, self._work([row]))

    def chat(self, text: str | Sequence[Mapping[str, Any]], adapter: str | None = None, **settings: Any) -> str:
        """The answer's text to a user's turn or a conversation; settings are fields of Request."""
        if isinstance(text, str):
            request = Request(prompt=text, adapter=adapter, **settings)
        else:
            request = Request(messages=tuple(text), adapter=adapter, **settings)
        return self._text(request)

    def generate(self, prompt: str, adapter: str | None = None, **settings: Any) -> str:
        """The continuation of a plain text, without a chat template; settings are fields of Request."""
        return self._text(Request(prompt=prompt, adapter=adapter, raw=True, **settings))

    def _text(self, request: Request) -> str:
        return unbroken(self.run([request]))[0].text

    def _pieces(self, row: Row, work: Batch | OneByOne) -> Iterator[str]:
        while work.busy:
            self._check_open()
            work.step()
            if piece := row.piece():
                yield piece
        unbroken([row.answer()])

    def _row(self, request: Request, number: int, streams: bool = False) -> Row:
        self._check_open()
        base = self.model.base
        ids = prompt_ids(request, number, base.tokenizer)
        vocabulary = base.model.get_input_embeddings().weight.shape[0]
        check_request(
            request, number, ids, adapters=self.model.residents, vocabulary=vocabulary, context=base.context
        )
        if request.stop and base.tokenizer is None:
            raise RequestError(f"{request.called(number)} has stop strings, but the base has no tokenizer")
        slot = -1 if request.adapter is None else self.model.resident(request.adapter).slot
        return Row(
            request, ids, slot, self.eos.union(_special(base.tokenizer, request.stop)), base.tokenizer, streams
        )

    def _work(self, rows: Sequence[Row]) -> Batch | OneByOne:
        if self.model.packs:
            return Batch(self.model, rows, self.max_batch)
        return OneByOne(self.model, rows)

    def _check_open(self) -> None:
        if self.closed:
            raise RequestError("this engine is closed: open another")


def eos_ids(model: AdaptedModel) -> frozenset[int]:
    """Every token that ends an answer: those of the generation config, the tokenizer's own, and the one with which
    the chat template ends an assistant's turn, as training learned it."""
    tokenizer = model.base.tokenizer
    own = getattr(getattr(model.model, "generation_config", None), "eos_token_id", None)
    found = {own} if own is None or isinstance(own, int) else set(own)
    found |= {getattr(tokenizer, "eos_token_id", None), end_of_turn(tokenizer)}
    return frozenset(token for token in found if token is not None)


def _special(tokenizer: Any, strings: Sequence[str]) -> Iterator[int]:
    """The special tokens among these strings, which no decoded text shows."""
    if strings:
        known = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        yield from (known[one] for one in strings if one in known)
