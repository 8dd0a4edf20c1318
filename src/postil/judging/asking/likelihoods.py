"""Likelihoods over packs: nats of rows and of windows of text, of options, and the token KL between two models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from postil.adapter import AdaptedModel
from postil.adapter.divergence import base_head, base_states
from postil.data import Sample, pack
from postil.data.encode import Draft, Tally, encode, leading_ids
from postil.data.packs import pack_shared, shared_tokens
from postil.kernels.layout import Layout, Spans
from postil.kernels.loss import cross_entropy, kl_divergence

PACK_TOKENS = 2048
_HEAD_ROWS = 512  # of logits at a time

Losses = list[tuple[float, int]]  # per sample (sum of nats over its target tokens, number of target tokens)
Adapters = str | Mapping[str, float] | None  # a resident's name, weights by name, or the bare base
Done = Callable[[int], None]  # told how many more samples are done


def weights_of(adapter: Adapters) -> dict[str, float]:
    """Residents and their weights: a name counts once, None is the bare base."""
    if adapter is None:
        return {}
    return {adapter: 1.0} if isinstance(adapter, str) else dict(adapter)


@torch.no_grad()
def row_losses(
    model: AdaptedModel, samples: Sequence[Sample], adapter: Adapters, done: Done = lambda _: None
) -> Losses:
    """Per sample (sum of nats over its target tokens, number of target tokens), in the samples' order.

    adapter: a resident's name, weights by name (0.5 halves its term), or None for the bare base. A sample's
    nats do not depend on the others. Raises AdapterError for an unknown name.
    """
    weights, device, out, share = weights_of(adapter), model.base.device, Losses(), model.shares_beginnings
    for group in _budgeted(samples, share):
        shared = pack_shared(group, share)
        packed = shared.pack
        spans = model.spans_for(weights, len(packed.ids))
        ids, positions = torch.from_numpy(packed.ids), torch.from_numpy(packed.positions)
        with model.using(Layout.packed(packed.lengths, spans, packed.before)):
            _, nll, targets = model.loss(
                ids.to(device), positions.to(device), torch.from_numpy(packed.weights).to(device)
            )
        found = _per_sample(nll, targets.cpu().numpy(), packed.lengths)
        out += [found[part] for part in shared.samples]
        done(len(group))
    return out


@torch.no_grad()
def token_scores(
    model: AdaptedModel, samples: Sequence[Sample], adapter: Adapters, done: Done = lambda _: None
) -> list[tuple[float, bool]]:
    """Per sample (sum of nats over its target tokens, whether each is the likeliest), in the samples' order."""
    weights, out, share = weights_of(adapter), list[tuple[float, bool]](), model.shares_beginnings
    for group in _budgeted(samples, share):
        shared = pack_shared(group, share)
        packed = shared.pack
        targets = np.flatnonzero(packed.weights)
        rows = torch.from_numpy(targets - 1).to(model.base.device)  # the state before a token predicts it
        ids = torch.from_numpy(packed.ids).to(model.base.device)
        wanted = ids[rows + 1].long()
        nats, hits = torch.zeros(len(targets)), torch.ones(len(targets), dtype=torch.bool)
        with model.using(Layout.packed(packed.lengths, model.spans_for(weights, len(packed.ids)), packed.before)):
            states = model.hidden(ids, torch.from_numpy(packed.positions).to(model.base.device))[rows]
            head = model.head_on(rows)
            for start in range(0, len(targets), _HEAD_ROWS):
                end = min(start + _HEAD_ROWS, len(targets))
                logits = head(states[start:end], start, end).float()
                nats[start:end] = functional.cross_entropy(logits, wanted[start:end], reduction="none")
                hits[start:end] = logits.argmax(-1) == wanted[start:end]
        missed = _per_sample((~hits).float(), targets, packed.lengths)
        sums = _per_sample(nats, targets, packed.lengths)
        out += [(sums[part][0], missed[part][0] == 0) for part in shared.samples]
        done(len(group))
    return out


@torch.no_grad()
def nats_and_kl(
    model: AdaptedModel,
    samples: Sequence[Sample],
    adapter: Adapters,
    base: AdaptedModel | None = None,
    done: Done = lambda _: None,
) -> tuple[Losses, Losses]:
    """Per sample what row_losses gives, and (sum over its target tokens of KL(base ‖ adapter) in nats, their number).

    KL(p ‖ q) = Σ_v p(v) (log p(v) - log q(v)) of the two distributions of the next token, p the bare base's.
    base: another model of the same vocabulary to stand for p; None is `model` without adapters. One pass of each.
    """
    weights, device, nats, kl = weights_of(adapter), model.base.device, Losses(), Losses()
    for group in _budgeted(samples):
        packed = pack(group)
        targets = np.flatnonzero(packed.weights)
        rows = torch.from_numpy(targets - 1).to(device)  # the state before a token predicts it
        ids, positions = torch.from_numpy(packed.ids).to(device), torch.from_numpy(packed.positions).to(device)
        layout = Layout.packed(packed.lengths, model.spans_for(weights, len(packed.ids)))
        bare = nullcontext() if base is None else base.using(replace(layout, spans=Spans()))
        with bare, model.using(layout):
            p = base_states(model, ids, positions, rows) if base is None else base.hidden(ids, positions)[rows]
            q, head = model.hidden(ids, positions)[rows], model.head_on(rows)
            loss_weights = torch.from_numpy(packed.weights[targets]).to(device)
            _, nll = cross_entropy(q, ids[rows + 1], loss_weights, head)
            _, divergence = kl_divergence(p, q, base_head(base or model), head)
        nats += _per_sample(nll, targets, packed.lengths)
        kl += _per_sample(divergence, targets, packed.lengths)
        done(2 * len(group))
    return nats, kl


def _per_sample(values: torch.Tensor, targets: NDArray[np.int64], lengths: Sequence[int]) -> Losses:
    owner = np.repeat(np.arange(len(lengths)), lengths)[targets]
    sums = np.bincount(owner, values.double().cpu().numpy(), minlength=len(lengths))
    counts = np.bincount(owner, minlength=len(lengths))
    return [(float(total), int(count)) for total, count in zip(sums, counts, strict=True)]


def _budgeted(samples: Sequence[Sample], share: bool = False) -> Iterator[list[Sample]]:
    """Neighbours, as many as fit in PACK_TOKENS; share: what a sample begins with like the one before is not counted
    again."""
    group: list[Sample] = []
    tokens = 0
    for sample in samples:
        more = len(sample.ids) - (shared_tokens(group[-1], sample) if share and group else 0)
        if group and tokens + more > PACK_TOKENS:
            yield group
            group, tokens, more = [], 0, len(sample.ids)
        group.append(sample)
        tokens += more
    if group:
        yield group


def mean_nats(losses: Sequence[tuple[float, int]]) -> float:
    """Nats per target token over all samples."""
    return sum(total for total, _ in losses) / max(sum(count for _, count in losses), 1)


def windows(tokenizer: Any, texts: Sequence[str], tokens: int | None, window: int) -> list[Sample]:
    """Running text as windows of `window` tokens, the first `tokens` of it (None: all), the last one shorter.

    The texts are joined by a blank line and tokenised once. Each window sees itself alone: it begins with the
    tokenizer's leading tokens (BOS) where it has some, else its first token is context and has no loss.
    """
    ids = tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    head = leading_ids(tokenizer)
    out: list[Sample] = []
    for start in range(0, len(ids), window - len(head)):
        part = np.array([*head, *ids[start : start + window - len(head)]], dtype=np.int32)
        if len(part) > max(len(head), 1):
            weights = np.ones(len(part), dtype=np.float32)
            weights[: max(len(head), 1)] = 0
            out.append(Sample(part, weights, len(out) + 1))
    return out


def option_samples(
    options: Sequence[Sequence[tuple[str, str]]], tokenizer: Any, limit: int | None
) -> tuple[list[list[Sample]], list[int]]:
    """Per question its options, each a (context, continuation), as samples with loss on the continuation alone.

    The two are tokenised as one text; a token that begins in the context is no target. Without any context the
    tokenizer's leading tokens stand for it, else its BOS or its end of text (as in lm-eval), so that the first token
    is scored too. limit: the most tokens of one. The second result names the questions (from 0) left out because one
    of their options is too long or has no token to score.
    """
    flat = [option for question in options for option in question]
    drafts = [
        Draft(number, context + text, ((len(context), len(context) + len(text), 1.0),), close=False)
        for number, (context, text) in enumerate(flat, 1)
        if context
    ]
    encoded = encode(drafts, tokenizer, limit=limit, too_long="drop", tally=Tally())
    whole = [_whole(number, text, tokenizer) for number, (context, text) in enumerate(flat, 1) if not context]
    fit = [sample for sample in whole if sample.target_tokens and (limit is None or len(sample.ids) <= limit)]
    found = {sample.row: sample for sample in (*encoded, *fit)}
    kept, left_out, first = [], [], 1
    for number, question in enumerate(options):
        samples = [found[row] for row in range(first, first + len(question)) if row in found]
        first += len(question)
        if len(samples) == len(question):
            kept.append(samples)
        else:
            left_out.append(number)
    return kept, left_out


def _whole(number: int, text: str, tokenizer: Any) -> Sample:
    """A text with loss on every token, after what stands before any text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    head = leading_ids(tokenizer) or _before_text(tokenizer)
    ids = ids if ids[: len(head)] == head else [*head, *ids]
    weights = np.ones(len(ids), dtype=np.float32)
    weights[: max(len(head), 1)] = 0
    return Sample(np.array(ids, dtype=np.int32), weights, number)


def _before_text(tokenizer: Any) -> list[int]:
    """BOS, or the end of a text before it, where the tokenizer itself puts nothing before a text."""
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [] if first is None else [int(first)]


def option_losses(
    model: AdaptedModel,
    questions: Sequence[Sequence[Sample]],
    adapter: Adapters,
    done: Done = lambda _: None,
) -> list[Losses]:
    """Per question, per option (nats of its continuation, tokens): the likelier option has fewer nats."""
    flat = row_losses(model, [sample for question in questions for sample in question], adapter, done)
    found = iter(flat)
    return [[next(found) for _ in question] for question in questions]
