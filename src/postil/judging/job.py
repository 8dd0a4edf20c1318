"""One judging on its way: what is judged, on what and how, its likelihoods and its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from postil.adapter import AdaptedModel
from postil.data import Sample
from postil.engine import Answer, Engine, Request
from postil.judging.general import General, Scored, measure
from postil.judging.metric import Metric
from postil.judging.options import JudgeOptions
from postil.judging.parts import NATS, Draw, Measured, stats_of
from postil.judging.probes import Probe
from postil.judging.scoring import Adapters, row_losses
from postil.judging.subject import Subject
from postil.judging.target import Target

if TYPE_CHECKING:
    from postil.judging.harness import Tasks

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
    few_ids: list[list[int]]
    watch: Watch
    notes: list[str]
    tasks: Tasks | None = None  # of lm-eval
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


def _per_item(target: Target, losses: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """The losses of each item's rows summed."""
    return [
        (sum(losses[place][0] for place in item.samples), sum(losses[place][1] for place in item.samples))
        for item in target.items
    ]


def answer_all(job: Job) -> None:
    """Every question asked of the adapter, the bare base, and the base with examples, in one engine run."""
    target, subject = job.target, job.subject
    if target is None or not target.answers:
        return
    context = subject.base.base.context
    zero = [target.request(None, item.ids, context) for item in target.items]
    mine = [target.request(subject.name, item.ids, context) for item in target.items]
    few = [target.request(None, ids, context) for ids in job.few_ids]
    if subject.other is None:
        found = run(job, subject.model, [*zero, *mine, *few], "answers")
    else:
        found = run(job, subject.base, [*zero, *few], "answers of the base")
        found[len(zero) : len(zero)] = run(job, subject.model, mine, "answers of what is judged")
    count = len(zero)
    job.answers = {"base": found[:count], "adapter": found[count : 2 * count]}
    if few:
        job.answers["few-shot"] = found[2 * count :]


def run(job: Job, model: AdaptedModel, requests: Sequence[Request], phase: str) -> list[Answer]:
    """The answers to requests, in one engine."""
    with Engine(model, max_batch=job.options.batch) as engine:
        return engine.run(requests, lambda n: job.watch({"phase": phase, "done": n, "total": len(requests)}))


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
