"""One judging on its way: what is judged, on what and how, its likelihoods and its answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from postil.adapter import AdaptedModel
from postil.data import Sample
from postil.engine import Answer, Engine, Request
from postil.engine.engine import eos_ids
from postil.judging.asking.likelihoods import Adapters, row_losses
from postil.judging.asking.memory import Memory
from postil.judging.card.build import NATS, Draw, Measured, stats_of
from postil.judging.metrics.metric import Metric
from postil.judging.options import JudgeOptions
from postil.judging.probes.probes import Probe
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
    tasks: Tasks | None = None  # of lm-eval
    training: Training | None = None  # what baselines know
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


def base_likelihoods(job: Job) -> Likelihoods:
    """Likelihoods of the bare base, asked once for all that is judged on it."""

    def make() -> dict[str, Any]:
        found = likelihoods(job, job.subject.base, None, "likelihoods of the base")
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

    return job.memory("likelihoods", asked(), make, read)


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
    job.answers = {"base": _of_base(job, zero, "answers of the base")}
    job.answers["adapter"] = run(job, subject.model, mine, "answers of what is judged")
    if few:
        job.answers["few-shot"] = _of_base(job, few, "answers of the base with examples")


def _of_base(job: Job, requests: Sequence[Request], phase: str) -> list[Answer]:
    """The bare base's answers, asked once for all that is judged on it."""
    asked = [repr((list(one.ids or ()), one.max_new_tokens, one.stop)).encode() for one in requests]

    def read(kept: Any) -> list[Answer]:
        found = [Answer(**one | {key: tuple(one[key]) for key in ("ids", "margins")}) for one in kept["answers"]]
        if len(found) != len(requests):
            raise ValueError("there is not one answer for each request")
        return found

    return job.memory(
        "answers", [repr((job.options.batch, sorted(eos_ids(job.subject.base)))).encode(), *asked],
        lambda: {"answers": [asdict(one) for one in run(job, job.subject.base, requests, phase)]}, read,
    )  # fmt: skip


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
