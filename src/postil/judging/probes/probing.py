"""Probes as parts of a score card: z against random adapters, the λ curve, and leakage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from postil.judging.asking.likelihoods import mean_nats, row_losses
from postil.judging.card.build import NATS, Measured
from postil.judging.card.model import Comparison, CurvePoint, Leakage, Part
from postil.judging.job import Job, Likelihoods, answers_of, likelihoods, run
from postil.judging.probes.probes import gap, leakage, null_adapter, pure, resident, scaled_adapter, with_z
from postil.judging.sets.general import MEASURES


def against_null(
    job: Job,
    part: Part | None,
    parts: dict[str, Part],
    bare: Likelihoods,
    mine: Likelihoods,
    answers: Measured,
) -> tuple[Part | None, dict[str, Part]]:
    """The parts with each measure's z against random adapters of equal norm."""
    subject, options = job.subject, job.options
    assert subject.adapter is not None
    target: dict[str, list[float]] = {}
    general: dict[tuple[str, str], list[float]] = {}
    for n in range(options.null):
        with resident(subject.model, null_adapter(subject.adapter, options.seed + n), f"{subject.name}-null") as name:
            found = likelihoods(job, subject.model, name, f"null adapter {n + 1} of {options.null}")
            here = dict(found.nats)
            if options.null_answers and job.target is not None and job.target.answers:
                here |= answers_of(job, name)
        for key, stats in here.items():
            metric = job.metrics.get(key, NATS)
            target.setdefault(key, []).append(gap(metric, (bare.nats | answers)[key], stats))
        for kind, measures in found.general.parts.items():
            for key, stats in measures.items():
                general.setdefault((kind, key), []).append(
                    gap(MEASURES[kind][key], bare.general.parts[kind][key], stats)
                )
    if part is not None:
        part = _with_gaps(part, target)
    found_parts = {
        kind: _with_gaps(one, {key: gaps for (other, key), gaps in general.items() if other == kind})
        for kind, one in parts.items()
    }
    return part, found_parts


def _with_gaps(part: Part, gaps: Mapping[str, Sequence[float]]) -> Part:
    measures: dict[str, Comparison] = {
        name: with_z(measure, gaps[name]) if name in gaps else measure for name, measure in part.measures.items()
    }
    return part.model_copy(update={"measures": measures})


def curve(job: Job, bare: Likelihoods, mine: Likelihoods, measured: Mapping[str, Measured]) -> list[CurvePoint]:
    """Target and general with the adapter's term at each scale; 0 is the base and 1 the adapter as measured."""
    subject, options = job.subject, job.options
    if not options.curve or subject.name is None or subject.adapter is None:
        return []
    if subject.model.resident(subject.name).saved:
        job.notes.append("no λ curve: the adapter replaces whole modules, which have no scale")
        return []
    windows = job.general.windows
    samples = job.target.samples if job.target is not None else ()
    done = job.counting("λ curve", (len(windows) + len(samples)) * len([s for s in options.curve if s not in (0, 1)]))
    main = next(iter(job.metrics.items()), None) if options.curve_answers and pure(subject.adapter) else None
    points = []
    for scale in options.curve:
        known = {0.0: bare, 1.0: mine}.get(scale)
        weights = {subject.name: scale}
        if known is not None:
            target = mean_nats(known.losses) if known.losses else None
            general = _general_nats(known)
        else:
            losses = row_losses(subject.model, samples, weights, done)
            target = mean_nats(losses) if losses else None
            text = row_losses(subject.model, windows, weights, done)
            general = mean_nats(text) if text else None
        value = None
        if main is not None:
            side = {0.0: measured.get("base"), 1.0: measured.get("adapter")}.get(scale)
            if side is None:
                with resident(
                    subject.model, scaled_adapter(subject.adapter, scale), f"{subject.name}-{scale}"
                ) as name:
                    side = answers_of(job, name)
            value = float(main[1].value(side[main[0]].sum(0)))
        points.append(CurvePoint(scale=scale, target=value, target_nats=target, general_nats=general))
    return points


def _general_nats(found: Likelihoods) -> float | None:
    measures = found.general.parts.get("nats")
    return None if measures is None else float(NATS.value(measures["nats"].sum(0)))


def leakage_of(job: Job) -> Leakage | None:
    """What the probed training rows showed; None where none were given."""
    if not job.probes:
        return None
    subject = job.subject
    return leakage(
        job.probes, job.held_out, subject.name, job.options.leakage, job.draw,
        lambda asked: run(job, subject.model, asked, "leakage"),
        lambda asked: run(job, subject.base, asked, "leakage of the base"),
    )  # fmt: skip
