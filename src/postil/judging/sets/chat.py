"""General ability as it is used: chat prompts of many kinds, and how an adapter answers what the base answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from postil.adapter import AdaptedModel
from postil.base import Base
from postil.data import Sample
from postil.data.rows import Row
from postil.data.shipped import NAMES, SHIPPED, shipped_rows
from postil.engine.engine import Engine
from postil.engine.own_answers import answered_samples, chat_ids, conversation, own_answers
from postil.engine.request import Answer, Request, unbroken
from postil.errors import AnswerError, DataError, JudgeError, listed
from postil.judging.asking.likelihoods import Adapters, Done, Losses, nats_and_kl, weights_of
from postil.judging.card.build import NATS, Draw, Measured, hits, measured, part_of, slices_of, stats_of
from postil.judging.card.model import DataUsed, Part
from postil.judging.sets.read import From, read_rows, used

START = 4  # tokens: how an answer begins
SHORT = 12  # tokens: a short answer, by which unlike prompts are told to be answered alike

KL = measured("kl", "lower", "nats/token")
SAME_START = measured("same_start", "higher", "%")
ALIKE = measured("alike", "lower", "%")
MEASURES = {"nats": NATS, "kl": KL, "same_start": SAME_START, "alike": ALIKE}


@dataclass(frozen=True, slots=True)
class ChatPrompts:
    """Prompts as tokens, each with its row; the base's own answers are asked for with `ask`."""

    data: DataUsed
    rows: tuple[Row, ...]
    messages: tuple[list[dict[str, Any]], ...]  # what each row asks
    ids: tuple[list[int], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chat:
    """The prompts with what the base answered: `samples` have loss on its answers."""

    prompts: ChatPrompts
    answers: tuple[Answer, ...]
    samples: tuple[Sample, ...]
    new_tokens: int  # that an answer has at most


def read_chat(source: From, base: Base, new_tokens: int) -> ChatPrompts | None:
    """The prompts of rows {"prompt"} or {"messages"} (SHIPPED: the sample that comes with postil), rendered by the
    base's own template; an answer that a row brings is left out, since the base's own is what is compared with.
    None where the base has no chat template and the sample is the shipped one: such a base is no chat model.

    Raises DataError naming the file and the line.
    """
    if not getattr(base.tokenizer, "chat_template", None):
        if isinstance(source, str) and source == SHIPPED:
            return None
        raise DataError("the base has no chat template, so chat prompts cannot be put to it: leave --chat out")
    shipped = isinstance(source, str) and source == SHIPPED
    rows = read_rows(shipped_rows("chat") if shipped else source)
    name = NAMES["chat"] if shipped else rows.name
    kept, said, ids, long = list[Row](), list[list[dict[str, Any]]](), list[list[int]](), list[int]()
    for row in rows.rows:
        try:
            messages = conversation(row.value)
            messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
            found = chat_ids(messages, row.number, base.tokenizer)
        except DataError as problem:
            raise DataError(f"{rows.where(row)}: {problem}") from None
        if base.context is not None and len(found) + new_tokens > base.context:
            long.append(row.number)
            continue
        kept.append(row)
        said.append(messages)
        ids.append(found)
    if not kept:
        raise DataError(f"{name}: no prompt fits the base's context of {base.context} tokens.")
    notes = [f"{name}: {len(long)} prompts are left out, too long (rows {listed(long, 5)})"] if long else []
    return ChatPrompts(used(name, kept), tuple(kept), tuple(said), tuple(ids), tuple(notes))


def ask(
    prompts: ChatPrompts, model: AdaptedModel, new_tokens: int, *, fresh: bool, done: Callable[[int], None]
) -> Chat:
    """The base's own greedy answers, at most `new_tokens` tokens each; kept in the user's cache."""
    answers = own_answers(model, prompts.ids, new_tokens=new_tokens, fresh=fresh, done=done)
    numbers = [row.number for row in prompts.rows]
    samples = answered_samples(prompts.ids, answers, model.base.tokenizer, numbers)
    return Chat(prompts, tuple(answers), tuple(samples), new_tokens)


def base_measures(chat: Chat, losses: Losses) -> Measured:
    """The base on its own answers; losses: its nats there. It begins as itself always; it, too, may answer alike."""
    starts = [answer.ids[:SHORT] for answer in chat.answers]
    return {
        "nats": stats_of(losses),
        "kl": stats_of([(0.0, count) for _, count in losses]),
        "same_start": hits([True] * len(starts)),
        "alike": hits(_alike(starts)),
    }


def measure_chat(
    chat: Chat,
    model: AdaptedModel,
    adapter: Adapters,
    base: AdaptedModel | None = None,
    *,
    batch: int = 32,
    done: Done = lambda _: None,
) -> Measured:
    """What is judged, on the base's answers: nats and KL(base ‖ it) per token, whether its own greedy answer begins
    with the same START tokens (or is the same where the base's is shorter), and whether its short answer (of SHORT
    tokens) is word for word that to another prompt, which prompts so unlike never have in common."""
    nats, kl = nats_and_kl(model, chat.samples, adapter, base, done)
    starts = _starts(chat, model, adapter, batch)
    done(len(starts))
    same = [mine[:START] == theirs.ids[:START] for mine, theirs in zip(starts, chat.answers, strict=True)]
    return {"nats": stats_of(nats), "kl": stats_of(kl), "same_start": hits(same), "alike": hits(_alike(starts))}


def _starts(chat: Chat, model: AdaptedModel, adapter: Adapters, batch: int) -> list[tuple[int, ...]]:
    """The first SHORT tokens of greedy answers (fewer where the base was let say no more), of a resident at its full
    weight or of the model itself. Raises JudgeError where one broke off: half an answer is none to compare."""
    name = next(iter(weights_of(adapter)), None)
    short = min(SHORT, chat.new_tokens)
    requests = [Request(ids=ids, adapter=name, max_new_tokens=short) for ids in chat.prompts.ids]
    with Engine(model, max_batch=batch) as engine:
        found = engine.run(requests)
    try:
        return [answer.ids for answer in unbroken(found)]
    except AnswerError as problem:
        raise JudgeError(f"chat answers of what is judged: {problem}") from None


def _alike(starts: Sequence[tuple[int, ...]]) -> list[bool]:
    """Whether another prompt has the same short answer."""
    return [starts.count(one) > 1 for one in starts]


def chat_part(
    chat: Chat,
    base: Measured,
    adapter: Measured,
    draw: Draw,
    columns: Sequence[str],
    smallest: int,
    defined: Mapping[str, Any] | None = None,
) -> Part:
    """The card's general part "chat": prompts are the units of the bootstrap. defined: as part_of."""
    rows = [row.value for row in chat.prompts.rows]
    slices, _ = slices_of(rows, columns, smallest)
    tokens = sum(sample.target_tokens for sample in chat.samples)
    data = chat.prompts.data.model_copy(update={"tokens": tokens})
    return part_of(data, "nats", MEASURES, base, adapter, draw, slices=slices, defined=defined)
