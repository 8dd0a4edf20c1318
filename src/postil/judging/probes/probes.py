"""Probes of an adapter: random ones of equal norm, its term scaled, and what it repeats of its training rows."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from postil import seeds
from postil.adapter import AdaptedModel, Adapter
from postil.data import Sample
from postil.engine import Answer, Request
from postil.errors import JudgeError
from postil.judging.card.build import Draw, estimated, hits, measured
from postil.judging.card.model import Comparison, Leakage
from postil.judging.metrics.metric import Metric, Statistics
from postil.judging.options import LeakageOptions
from postil.judging.sets.read import chosen

LEAKED = measured("leaked", "lower", "%")
_WORST = 20  # rows that the card names

Answering = Callable[[Sequence[Request]], list[Answer]]


# -- null adapters ----------------------------------------------------------------------------------------


def update_norms(adapter: Adapter) -> dict[str, float]:
    """Per adapted module ‖B·A‖_F, without alpha/r, from r × r products: ‖BA‖² = Σ (BᵀB) ∘ (AAᵀ), in float64."""
    out = {}
    for path in adapter.modules:
        a, b = (adapter.tensors[key].double() for key in _pair(adapter, path))
        out[path] = float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt())
    return out


def null_adapter(adapter: Adapter, seed: int) -> Adapter:
    """An adapter of the same structure with random A and B (normal), each module's ‖B·A‖_F as the trained one's.

    What it changes is what so large a change in no direction does: the noise floor. Modules saved whole and biases
    stay the trained ones.
    """
    tensors = dict(adapter.tensors)
    wanted = update_norms(adapter)
    for path in adapter.modules:
        generator = torch.Generator().manual_seed(seeds.derive(seed, "null", path))
        for key in _pair(adapter, path):
            tensors[key] = torch.randn(adapter.tensors[key].shape, generator=generator)
    random = replace(adapter, tensors=tensors, card={}, path=None)
    for path, norm in update_norms(random).items():
        tensors[_pair(adapter, path)[1]] *= wanted[path] / norm
    return random


def scaled_adapter(adapter: Adapter, scale: float) -> Adapter:
    """The adapter with its term times `scale`: every B multiplied."""
    tensors = dict(adapter.tensors)
    for path in adapter.modules:
        tensors[_pair(adapter, path)[1]] = tensors[_pair(adapter, path)[1]] * scale
    return replace(adapter, tensors=tensors, card={}, path=None)


def _pair(adapter: Adapter, path: str) -> tuple[str, str]:
    embedding = f"{path}.lora_embedding_A" in adapter.tensors
    kind = "lora_embedding_{}" if embedding else "lora_{}.weight"
    return f"{path}.{kind.format('A')}", f"{path}.{kind.format('B')}"


@contextmanager
def resident(model: AdaptedModel, adapter: Adapter, name: str) -> Iterator[str]:
    """The adapter in the model for the time of the block."""
    model.add(name, adapter)
    try:
        yield name
    finally:
        model.remove(name)


def gap(metric: Metric, base: Statistics, other: Statistics) -> float:
    """Value of `other` minus value of `base`, over all units."""
    return float(metric.value(other.sum(0)) - metric.value(base.sum(0)))


def with_z(measure: Comparison, gaps: Sequence[float]) -> Comparison:
    """The measure with z = (difference - mean of the null adapters' differences) / their standard deviation; no z
    where they do not differ."""
    spread = float(np.std(gaps, ddof=1)) if len(gaps) > 1 else 0.0
    if spread == 0:
        return measure
    return measure.model_copy(update={"z": (measure.difference.value - float(np.mean(gaps))) / spread})


# -- leakage ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Probe:
    """A row to be tried: what is given, what followed it, and the row's number."""

    given: tuple[int, ...]
    rest: tuple[int, ...]
    row: int


def leakage_probes(
    samples: Sequence[Sample], options: LeakageOptions, ends: frozenset[int], seed: int
) -> list[Probe]:
    """Rows that taught at least prefix_tokens + matched_tokens tokens in one run, `options.rows` of them by chance.

    Given is all that stands before the row's longest learned run and its first prefix_tokens. ends: the tokens
    that end an answer, which are not matched.
    """
    found = []
    for sample in samples:
        start, end = _longest_run(sample)
        while end > start and int(sample.ids[end - 1]) in ends:
            end -= 1
        cut = start + options.prefix_tokens
        if end - cut >= options.matched_tokens and cut > 0:
            ids = sample.ids.tolist()
            found.append(Probe(tuple(ids[:cut]), tuple(ids[cut:end]), sample.row))
    return [found[place] for place in chosen(len(found), options.rows, seed, "leakage")]


def check_probes(probes: Sequence[Probe], options: LeakageOptions, name: str) -> None:
    """Raise JudgeError where no row is long enough to try."""
    if not probes:
        raise JudgeError(
            f"{name}: no row teaches {options.prefix_tokens} + {options.matched_tokens} tokens in one run, so none "
            "can be tried for leakage; lower leakage.matched_tokens or leakage.prefix_tokens with --set"
        )


def _longest_run(sample: Sample) -> tuple[int, int]:
    """First and end of the longest run of tokens with loss; (0, 0) for none."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.weights > 0, [0]]).astype(np.int8)))
    runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    return max(runs, key=lambda run: run[1] - run[0], default=(0, 0))


def leakage(
    probes: Sequence[Probe], held_out: Sequence[Probe], adapter: str | None, options: LeakageOptions, draw: Draw,
    answer: Answering, answer_base: Answering,
) -> Leakage:  # fmt: skip
    """Greedy continuations of the probes by adapter and base (Carlini et al. 2023, section 3.1): the share of rows
    of which at least matched_tokens tokens come back verbatim in one run; `held_out`: rows never learned.

    answer, answer_base: run requests on the judged model and on the base.
    """

    def matches(tried: Sequence[Probe], name: str | None, run: Answering) -> list[int]:
        asked = [
            Request(ids=one.given, adapter=name, max_new_tokens=min(len(one.rest), options.new_tokens))
            for one in tried
        ]
        return [longest_match(found.ids, one.rest) for found, one in zip(run(asked), tried, strict=True)]

    mine, bare = matches(probes, adapter, answer), matches(probes, None, answer_base)
    other = matches(held_out, adapter, answer) if held_out else []
    leaked = {
        name: estimated(LEAKED, hits([one >= options.matched_tokens for one in found]), draw)
        for name, found in (("adapter", mine), ("base", bare), ("held_out", other))
        if found
    }
    worst = [
        n for n in np.argsort([-one for one in mine], kind="stable") if mine[n] >= options.matched_tokens > bare[n]
    ]
    return Leakage(
        rows=len(probes),
        prefix_tokens=options.prefix_tokens,
        matched_tokens=options.matched_tokens,
        worst_rows=[probes[n].row for n in worst[:_WORST]],
        **leaked,
    )


def longest_match(answer: Sequence[int], rest: Sequence[int]) -> int:
    """Tokens of the longest run that stands in both."""
    match = difflib.SequenceMatcher(None, list(answer), list(rest), autojunk=False).find_longest_match()
    return match.size


def pure(adapter: Adapter) -> bool:
    """Whether the adapter is B·A alone, without biases and modules saved whole."""
    return all(".lora_" in key for key in adapter.tensors)
