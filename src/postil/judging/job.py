"""One judging on its way: what is judged, on what and how, its likelihoods and its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from postil.adapter import AdaptedModel
from postil.data import Sample
from postil.engine import Answer, Engine, Request, unbroken
from postil.engine.engine import eos_ids
from postil.engine.memory import Keep, Memory, asked_of
from postil.errors import AnswerError, JudgeError
from postil.judging.asking.likelihoods import Adapters, row_losses
from postil.judging.asking.predictions import answer_line
from postil.judging.card.build import NATS, Draw, Measured, stats_of
from postil.judging.card.model import Contamination
from postil.judging.metrics.metric import Metric
from postil.judging.options import JudgeOptions
from postil.judging.probes.probes import Probe
from postil.judging.sets.chat import Chat, ChatPrompts, ask, base_measures, measure_chat
from postil.judging.sets.examples import Training
from postil.judging.sets.general import General, Scored, measure
from postil.judging.sets.target import FewShot, Target
from postil.judging.subject import Subject

if TYPE_CHECKING:
    from postil.judging.asking.harness import Tasks

Watch = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class Job:
    """One judging on its way: what is judged, on what, how, and what was found so far."""

    subject: Subject
    options: JudgeOptions
    general: General
    target: Target | None
    metrics: dict[str, Metric]
    probes: list[Probe]
    held_out: list[Probe]
    few: FewShot
    watch: Watch
    notes: list[str]
    memory: Memory
    own: Memory = field(default_factory=lambda: Memory(None))  # of what is judged, as `memory` is of the base
    tell: Callable[[dict[str, Any]], None] = lambda _: None  # each answer as it comes
    tasks: Tasks | None = None  # of lm-eval
    prompts: ChatPrompts | None = None
    training: Training | None = None  # what baselines know
    contamination: Contamination | None = None
    answers: dict[str, list[Answer]] = field(default_factory=dict)  # "base", "adapter", "few-shot"

    @property
    def draw(self) -> Draw:
        """How intervals are drawn."""
        return Draw(self.options.seed, self.options.resamples, self.options.level)

    def counting(self, phase: str, total: int) -> Callable[[int], None]:
        """Tell the watcher how far a phase is; what it returns adds to the count."""
        count = 0
        self.watch({"phase": phase, "done": 0, "total": total})

        def add(more: int) -> None:
            nonlocal count
            count += more
            self.watch({"phase": phase, "done": count, "total": total})

        return add


@dataclass(frozen=True, slots=True)
class Likelihoods:
    """losses: (nats, tokens) of each target item; general: statistics of the general sets."""

    losses: list[tuple[float, int]]
    general: Scored

    @property
    def nats(self) -> Measured:
        """The target's losses as statistics; none without a target."""
        return {NATS.name: stats_of(self.losses)} if self.losses else {}


def likelihoods(
    job: Job, model: AdaptedModel, adapter: Adapters, phase: str, other: AdaptedModel | None = None
) -> Likelihoods:
    """What a model makes of the target's rows and the general sets; other: the base, where it is another model."""
    samples: Sequence[Sample] = job.target.samples if job.target is not None else ()
    done = job.counting(phase, len(samples) + job.general.work)
    losses = _per_item(job.target, row_losses(model, samples, adapter, done)) if job.target is not None else []
    return Likelihoods(losses, measure(job.general, model, adapter, other, done))


def base_chat(job: Job) -> tuple[Chat, Measured] | None:
    """The chat prompts with the base's own answers, and its measures on them, asked once for all judged on it."""
    if job.prompts is None:
        return None
    options, total = job.options, len(job.prompts.ids)
    phase = "chat answers of the base"
    chat = ask(
        job.prompts, job.subject.base, options.general.chat_tokens, fresh=options.fresh,
        done=lambda count: job.watch({"phase": phase, "done": count, "total": total}),
    )  # fmt: skip

    def make() -> dict[str, Any]:
        return {"losses": row_losses(job.subject.base, chat.samples, None)}

    asked = [sample.ids.tobytes() + sample.weights.tobytes() for sample in chat.samples]
    losses = job.memory("chat", asked, make, lambda kept: _pairs(kept["losses"]))
    return chat, base_measures(chat, losses)


def chat_of(job: Job, chat: Chat) -> Measured:
    """What is judged, on the base's answers to the chat prompts."""
    subject = job.subject
    done = job.counting("chat answers of what is judged", 3 * len(chat.samples))
    return measure_chat(chat, subject.model, subject.weights, subject.other, batch=job.options.batch, done=done)


def _per_item(target: Target, losses: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """The losses of each item's rows summed."""
    return [
        (sum(losses[place][0] for place in item.samples), sum(losses[place][1] for place in item.samples))
        for item in target.items
    ]


def base_likelihoods(job: Job) -> Likelihoods:
    """Likelihoods of the bare base, asked once for all that is judged on it."""
    return _kept(job, job.memory, lambda: likelihoods(job, job.subject.base, None, "likelihoods of the base"))


def own_likelihoods(job: Job) -> Likelihoods:
    """Likelihoods of what is judged, found again where an earlier judging of it was stopped."""
    subject, phase = job.subject, "likelihoods of what is judged"
    return _kept(job, job.own, lambda: likelihoods(job, subject.model, subject.weights, phase, subject.other))


def _kept(job: Job, memory: Memory, ask: Callable[[], Likelihoods]) -> Likelihoods:
    def make() -> dict[str, Any]:
        found = ask()
        parts = {
            part: {name: stats.tolist() for name, stats in measured.items()}
            for part, measured in found.general.parts.items()
        }
        return {"losses": found.losses, "parts": parts, "options": found.general.options}

    def asked() -> Iterator[bytes]:
        sets = {name: found.samples for name, found in job.general.sets.items()}
        yield repr((job.general.kl, {name: list(map(len, found)) for name, found in sets.items()})).encode()
        yield repr({name: found.right for name, found in job.general.sets.items()}).encode()
        yield repr([item.samples for item in job.target.items] if job.target is not None else None).encode()
        flat = [sample for found in sets.values() for question in found for sample in question]
        for sample in (*(job.target.samples if job.target is not None else ()), *job.general.windows, *flat):
            yield sample.ids.tobytes() + sample.weights.tobytes()

    def read(kept: Any) -> Likelihoods:
        parts = {
            part: {name: np.array(stats, dtype=np.float64).reshape(len(stats), -1) for name, stats in found.items()}
            for part, found in kept["parts"].items()
        }
        options = {name: [_pairs(question) for question in found] for name, found in kept["options"].items()}
        return Likelihoods(_pairs(kept["losses"]), Scored(parts, options))

    return memory("likelihoods", asked(), make, read)


def _pairs(values: Sequence[Sequence[float]]) -> list[tuple[float, int]]:
    return [(float(total), int(count)) for total, count in values]


def answer_all(job: Job) -> None:
    """Every question asked of the adapter, the bare base, and the base with examples."""
    target, subject = job.target, job.subject
    if target is None or not target.answers:
        return
    context = subject.base.base.context
    zero = [target.request(None, item.ids, context) for item in target.items]
    mine = [target.request(subject.name, item.ids, context) for item in target.items]
    few = [target.request(None, ids, context) for ids in job.few.ids]
    sides = [("base", subject.base, zero, "answers of the base"),
             ("adapter", subject.model, mine, "answers of what is judged"),
             ("few-shot", subject.base, few, "answers of the base with examples")]  # fmt: skip
    for side, model, asked, phase in sides:
        if asked:
            lines = partial(_line, job, target, side)
            job.answers[side] = run(job, model, asked, phase, lines)


def _line(job: Job, target: Target, side: str, place: int, answer: Answer) -> None:
    job.tell(answer_line(target.items[place], side, answer))


def run(
    job: Job, model: AdaptedModel, requests: Sequence[Request], phase: str,
    tell: Callable[[int, Answer], None] = lambda _, __: None,
) -> list[Answer]:  # fmt: skip
    """The answers to requests, in one engine; those of the bare base and of what is judged are kept as they come, so
    that a judging that was stopped goes on there. tell: told each as it is known, with its place. Raises JudgeError
    where one broke off: half an answer is no answer to score, and what overflows is not fit to serve, whatever its
    other answers are worth."""

    def make(places: Sequence[int], keep: Keep) -> None:
        left = [requests[place] for place in places]

        def add(place: int, answer: Answer) -> None:
            if answer.error is None:
                keep(places[place], asdict(answer))

        with Engine(model, max_batch=job.options.batch) as engine:
            found = engine.run(left, lambda n: job.watch({"phase": phase, "done": n, "total": len(left)}), add)
        try:
            unbroken(found)
        except AnswerError as problem:
            raise JudgeError(f"{phase}: {problem}") from None

    def read(kept: Any) -> Answer:
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in kept.items()
        }
        return Answer(**values)

    common = repr((job.options.batch, sorted(eos_ids(model)))).encode()
    asked = [common + asked_of(one, number, model) for number, one in enumerate(requests, 1)]
    return _memory_of(job, model, requests).each("answers", asked, make, read, tell)


def _memory_of(job: Job, model: AdaptedModel, requests: Sequence[Request]) -> Memory:
    """Where the answers to requests are kept: with the base's, with those of what is judged, or nowhere (those of
    random adapters and of other scales)."""
    names, subject = {one.adapter for one in requests}, job.subject
    if model is subject.model and names == {subject.name}:
        return job.own
    return job.memory if model is subject.base and names == {None} else Memory(None)


def answered(job: Job, answers: Sequence[Answer]) -> Measured:
    """Statistics of answers by each measure."""
    assert job.target is not None
    texts = [answer.text.strip() for answer in answers]
    return {name: metric.statistics(texts, job.target.values) for name, metric in job.metrics.items()}


def answers_of(job: Job, name: str) -> Measured:
    """Measures of the answers that another resident gives."""
    target = job.target
    assert target is not None
    context = job.subject.model.base.context
    asked = [target.request(name, item.ids, context) for item in target.items]
    return answered(job, run(job, job.subject.model, asked, f"answers of {name}"))
