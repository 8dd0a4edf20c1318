"""judge: an adapter (or a fine-tuned model) beside its base, on its target and on general ability: a score card."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel

from postil.adapter import AdaptedModel
from postil.adapter.identity import published
from postil.base import Base
from postil.data import DataOptions, load_data
from postil.data.shipped import SHIPPED
from postil.engine.engine import eos_ids
from postil.engine.memory import Memory
from postil.errors import JudgeError, listed
from postil.judging.asking.predictions import as_they_come, lines_of, write_predictions
from postil.judging.card.build import NATS, OTHERS, Measured, check_columns, part_of, slices_of
from postil.judging.card.command import Sources, command_of
from postil.judging.card.definition import source_of
from postil.judging.card.model import Part, ScoreCard
from postil.judging.gate.conditions import check_measures
from postil.judging.gate.items import FLAGS
from postil.judging.job import Job, Watch, answer_all, answered, base_chat, base_likelihoods, chat_of, own_likelihoods
from postil.judging.metrics import default_metric, metric_named
from postil.judging.metrics.metric import Metric
from postil.judging.metrics.own import is_own
from postil.judging.options import JudgeOptions
from postil.judging.probes.contamination import contamination_of
from postil.judging.probes.probes import Probe, check_probes, leakage_probes
from postil.judging.probes.probing import against_null, curve, leakage_of
from postil.judging.probes.trivial import beside_baselines
from postil.judging.sets.chat import MEASURES, SHORT, START, chat_part, read_chat
from postil.judging.sets.examples import Training, read_training, recipe_file
from postil.judging.sets.general import general_parts, read_general
from postil.judging.sets.read import From
from postil.judging.sets.target import FewShot, Target, check_answers, few_shot, read_target
from postil.judging.subject import Judged, Subject, keep_card, opened

if TYPE_CHECKING:
    from postil.judging.asking.harness import Tasks

NO_SHOTS = "few-shot examples need a target and a training file to draw them from: give --train FILE"
VERSIONS = ("postil", "torch", "transformers", "sacrebleu")


def judge(
    base: Base | PreTrainedModel | AdaptedModel,
    judged: Judged,
    *,
    target: From | None = None,
    general: From | None = SHIPPED,
    chat: From | None = SHIPPED,
    choices: From | None = None,
    pairs: From | None = None,
    train: From | None = None,
    leaks: From | None = None,
    options: JudgeOptions | None = None,
    gate: str | None = None,
    predictions: str | Path | None = None,
    watch: Watch = lambda _: None,
    keep: bool = True,
    force: bool = False,
) -> ScoreCard:
    """Judge an adapter beside its base; the base is afterwards as before.

    judged: an adapter directory, an Adapter, the name of a resident of an AdaptedModel, or a fine-tuned model
    (directory or Base), which is compared in the same way. target: held-out rows of its task. general: running text
    of what must not get worse; chat: prompts of many kinds, to be answered as the base answers them (by default the
    samples that ship with postil; None leaves one out); choices and pairs answered by likelihood. train: the rows it
    was trained on, for few-shot examples (options.shots) and baselines; by default the file that its recipe names,
    where that is still there with the same bytes. leaks: rows it was trained on, tried for verbatim leakage. gate:
    the expression that the card is for, so that a measure misspelt in it is found before the work. predictions: a
    JSONL for every answer, FILE.partial while they come (a judging that was stopped goes on where it was). watch:
    told {"phase", "done", "total"}. keep: put the card into an Adapter's `card`, or the directory's postil.json,
    unless that is a published version. force: take an adapter made for another base.
    Raises JudgeError, DataError, AdapterError, BaseModelError, StorageError.
    """
    options = options or JudgeOptions()
    sources = Sources(target, general, chat, choices, pairs, train, leaks)
    if options.shots and target is None:
        raise JudgeError(NO_SHOTS)
    if not (sources.any_set() or options.lm_eval.tasks):
        raise JudgeError("there is nothing to judge on: give --target FILE, or general text")
    with opened(base, judged, force=force) as subject:
        if keep and subject.directory is not None and published(subject.directory):
            keep = False
            subject.notes.append(
                f"{subject.directory} is a published version, which never changes: it keeps its card"
            )
        if keep and subject.directory is not None and not os.access(subject.directory, os.W_OK):
            raise JudgeError(
                f"{subject.directory} cannot be written, so the score card has no place there: leave it out with "
                "--no-keep (keep=False), or copy the directory"
            )
        job = _prepared(subject, options, sources, watch)
        if gate is not None and job.tasks is None:  # lm-eval's measures are known after its tasks have run
            known = job.general.measures | ({"chat": MEASURES} if job.prompts is not None else {})
            check_measures(gate, [*job.metrics, NATS.name] if job.target is not None else None, known)
        with as_they_come(predictions) as job.tell:
            card = _judged(job, command_of(judged, subject.base.base, sources, options), predictions)
        if keep:
            keep_card(subject, card)
        return card


def _prepared(subject: Subject, options: JudgeOptions, sources: Sources, watch: Watch) -> Job:
    """Everything read and checked before the first forward pass."""
    base, notes = subject.base.base, list(subject.notes)
    if subject.name is None and (options.null or options.curve):
        raise JudgeError(
            "null adapters and the λ curve are of adapters; leave --null and --curve out for a whole model"
        )
    rows = options.rows or subject.rows()
    general = read_general(sources.general, sources.choices, sources.pairs, base, options.general, options.seed)
    target, metrics, few, training = None, dict[str, Metric](), FewShot((), 0), None
    if sources.target is not None:
        target = read_target(sources.target, base, rows, limit=options.limit, max_new_tokens=options.max_new_tokens,
                             stop=options.stop, seed=options.seed)  # fmt: skip
        check_answers(target, options.metrics)
        notes += target.notes
        metrics = _metrics(target, options, notes) if target.answers else {}
        if target.answers:
            training = _training(subject, sources.train, target, notes)
            if training is None and options.shots:
                raise JudgeError(NO_SHOTS)
            if training is not None and options.shots != 0:
                few = few_shot(target, training, base, options.shots, options.seed)
                notes += few.notes
    prompts = None
    if sources.chat is not None:
        prompts = read_chat(sources.chat, base, options.general.chat_tokens)
        notes += prompts.notes if prompts is not None else ["no chat is measured: the base has no chat template"]
    looked_at = [[row.value for row in one.rows] for one in general.sets.values()]
    if prompts is not None:
        looked_at.append([row.value for row in prompts.rows])
    check_columns(options.slices, [target.values if target is not None else [], *looked_at])
    probes, held_out = _probes(subject, options, sources.leaks, rows, target)
    documents = [{"text": text} for text in general.documents]
    asked = [{"messages": messages} for messages in prompts.messages] if prompts is not None else []
    questions = [row.value for found in general.sets.values() for row in found.rows]
    contamination, said = contamination_of(
        subject.card, target.items if target is not None else (), [*documents, *asked, *questions],
        options.general.prompt,
    )  # fmt: skip
    known = None if subject.base.merged else base  # with an adapter merged into it, it is not what its files say
    return Job(
        subject, options, general, target, metrics, probes, held_out, few, watch, [*notes, *general.notes, *said],
        Memory(known, fresh=options.fresh), Memory(known, of=subject.digest, fresh=options.fresh),
        tasks=_tasks(options), prompts=prompts, training=training,
        contamination=contamination,
    )  # fmt: skip


def _training(subject: Subject, given: From | None, target: Target, notes: list[str]) -> Training | None:
    """The rows that the adapter was trained on, as given or as its recipe names them."""
    if given is not None:
        return read_training(given, target.options, target.format, asked_for=True)[0]
    data = subject.card.get("data")
    file = recipe_file(subject.recipe, data if isinstance(data, dict) else {})
    if file is None:
        return None
    training, note = read_training(file, subject.rows(), target.format, asked_for=False)
    notes += [note] if note else []
    return training


def _tasks(options: JudgeOptions) -> Tasks | None:
    """lm-eval's tasks, where any are asked for. Raises JudgeError where the extra is not installed."""
    if not options.lm_eval.tasks:
        return None
    try:
        from postil.judging.asking.harness import open_tasks
    except ModuleNotFoundError as problem:
        if not (problem.name or "").startswith("lm_eval"):
            raise
        raise JudgeError(
            "lm-eval's tasks need an extra that is not installed: pip install 'postil[lm-eval]'"
        ) from None
    return open_tasks(options.lm_eval, options.seed, FLAGS)


def _of_tasks(job: Job) -> dict[str, Part]:
    """A part for each of lm-eval's tasks."""
    if job.tasks is None:
        return {}
    from postil.judging.asking.harness import HarnessModel, harness_parts

    subject, batch = job.subject, job.options.batch
    base = HarnessModel(
        subject.base, None, batch, lambda total: job.counting("lm-eval of the base", total), job.memory
    )
    judged = HarnessModel(
        subject.model, subject.name, batch, lambda total: job.counting("lm-eval of what is judged", total), job.own
    )
    return harness_parts(job.tasks, base, judged, job.draw, job.notes, _form(job))


def _probes(
    subject: Subject, options: JudgeOptions, leaks: From | None, rows: DataOptions, target: Target | None
) -> tuple[list[Probe], list[Probe]]:
    """Training rows to be tried for leakage, and rows of the target, which was never learned, beside them."""
    if leaks is None:
        return [], []
    ends = eos_ids(subject.base)
    learned = load_data(leaks, subject.base.base, rows.model_copy(update={"too_long": "truncate"}))
    probes = leakage_probes(learned.samples, options.leakage, ends, options.seed)
    check_probes(probes, options.leakage, learned.report.source)
    held_out = target.samples if target is not None else ()
    return probes, leakage_probes(held_out, options.leakage, ends, options.seed)


def _metrics(target: Target, options: JudgeOptions, notes: list[str]) -> dict[str, Metric]:
    """The measures of answers by name, the main one first."""
    names = options.metrics
    if not names:
        name, why = default_metric(target.values)
        names = (name,)
        notes.append(f"measured by {name}, since {why}")
    for name in options.metric_options:
        if name not in names:
            raise JudgeError(f"metric_options: {name!r} is none of the metrics asked for ({', '.join(names)})")
    found: dict[str, Metric] = {}
    for name in names:
        metric = metric_named(name, options.metric_options.get(name))
        if metric.name in (*found, NATS.name):
            raise JudgeError(f"metrics: two measures would be called {metric.name!r}; give each once")
        found[metric.name] = metric
        if not is_own(name):
            metric.statistics([""] * len(target.items), target.values)  # what is wrong with the rows is said now
        notes += metric.look(target.values)
    return found


def _judged(job: Job, command: str, predictions: str | Path | None) -> ScoreCard:
    subject, base = job.subject, job.subject.base
    bare, chat = base_likelihoods(job), base_chat(job)
    mine = own_likelihoods(job)
    answer_all(job)
    measured = {who: answered(job, answers) for who, answers in job.answers.items()}
    part = None
    if job.target is not None:
        part = _target_part(job, bare.nats | measured.get("base", {}), mine.nats | measured.get("adapter", {}),
                            measured.get("few-shot", {}))  # fmt: skip
        if job.target.answers:
            beside, said = beside_baselines(job.target, job.training, job.metrics, measured["adapter"],
                                            measured.get("few-shot", {}), job.draw)  # fmt: skip
            part, job.notes = part.model_copy(update={"baselines": beside}), job.notes + said
    options = job.options
    defined = _form(job) | {"window": options.general.window, "prompt": options.general.prompt}
    parts = general_parts(
        job.general, bare.general, mine.general, job.draw, options.slices, options.smallest_slice, defined
    )
    if chat is not None:
        found, theirs = chat
        defined = _form(job) | {"chat_tokens": options.general.chat_tokens, "start": START, "short": SHORT}
        parts["chat"] = chat_part(
            found, theirs, chat_of(job, found), job.draw, options.slices, options.smallest_slice, defined
        )
    parts |= _of_tasks(job)
    if options.null:
        part, parts = against_null(job, part, parts, bare, mine, measured.get("base", {}))
    fingerprint = base.base.fingerprint()
    card = ScoreCard(
        base={"source": fingerprint.source, "form": fingerprint.form},
        adapter_sha256=subject.sha256,
        target=part,
        general=parts,
        null_adapters=options.null,
        curve=curve(job, bare, mine, measured),
        leakage=leakage_of(job),
        scope=options.scope,
        chat_template=bool(getattr(base.base.tokenizer, "chat_template", None)),
        contamination=job.contamination,
        command=command,
        seed=options.seed,
        versions={name: version(name) for name in VERSIONS},
        notes=job.notes,
    )
    if predictions is not None:
        sides = {"base": (bare.losses, bare.general.options), "adapter": (mine.losses, mine.general.options)}
        write_predictions(predictions, lines_of(job.target, job.general, job.answers, measured, sides, job.few.shots))
    return card


def _target_part(job: Job, bare: Measured, mine: Measured, few: Measured) -> Part:
    assert job.target is not None
    options = job.options
    slices, small = slices_of(job.target.values, options.slices, options.smallest_slice)
    for column, values in small.items():
        job.notes.append(
            f"slices: {len(values)} values of {column} have fewer than {options.smallest_slice} rows and are one "
            f"slice, {OTHERS}: {listed(values)}"
        )
    metrics = {**job.metrics, NATS.name: NATS}
    base, adapter = ({name: found[name] for name in metrics} for found in (bare, mine))
    return part_of(
        job.target.data, next(iter(metrics)), metrics, base, adapter, job.draw,
        slices=slices, few_shot=few, shots=job.few.shots if few else 0, defined=_form(job) | {
            "rows": job.target.options.model_dump(mode="json"), "format": job.target.format},
        defined_each=_definitions(job.target, job.metrics, options),
    )  # fmt: skip


def _definitions(target: Target, metrics: Mapping[str, Metric], options: JudgeOptions) -> dict[str, dict[str, Any]]:
    """What defines each measure of answers: its options, its own file, and how answers are asked for."""
    asked = {"max_new_tokens": target.max_new_tokens, "stop": target.stop}
    names = dict(zip(metrics, options.metrics, strict=False))  # none were asked for: the one that fits has no options
    return {
        measure: asked
        | {"options": options.metric_options.get(names.get(measure, "")), "file": source_of(names.get(measure, ""))}
        for measure in metrics
    }


def _form(job: Job) -> dict[str, Any]:
    """What every measure of a judging hangs on."""
    return {"form": job.subject.base.base.fingerprint().form}
