"""Sampling: the next token of each row from its logits, by that row's own settings and generator alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from postil.engine.request import Request


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token, the difference of the two best logits, and its log-probability if it was asked for."""

    token: int
    margin: float
    logprob: float | None


def generator_of(request: Request) -> torch.Generator | None:
    """The request's own source of chance (on the CPU, so the same on every device); None where it is greedy."""
    if request.temperature == 0:
        return None
    return torch.Generator().manual_seed(request.seed)


def choose(
    logits: Float[torch.Tensor, "rows vocabulary"],
    requests: Sequence[Request],
    generators: Sequence[torch.Generator | None],
) -> list[Choice | None]:
    """The next token of each row; argmax in float32 where the row has no generator. None where a row has none to
    choose: its largest logit is no finite number (a NaN counts as the largest)."""
    logits = logits.float()
    tokens = logits.argmax(-1).tolist()
    best = logits.topk(2, -1).values
    margins = (best[:, 0] - best[:, 1]).tolist()
    choices: list[Choice | None] = []
    for row, (request, generator, top) in enumerate(zip(requests, generators, best[:, 0].tolist(), strict=True)):
        if not math.isfinite(top):
            choices.append(None)
            continue
        token = tokens[row] if generator is None else draw(logits[row], request, generator)
        logprob = float(logits[row, token] - logits[row].logsumexp(-1)) if request.logprobs else None
        choices.append(Choice(token, margins[row], logprob))
    return choices


def draw(logits: Float[torch.Tensor, " vocabulary"], request: Request, generator: torch.Generator) -> int:
    """One token by temperature, then the top_k best, then the fewest tokens that hold top_p of the rest.

    Nucleus sampling: Holtzman et al. 2020, section 3.1. One uniform number per token, looked up in the
    cumulative probabilities in vocabulary order, so that tiny differences of logits seldom change it.
    """
    scores = logits.detach().cpu().double()
    scores = (scores - scores.max()) / request.temperature
    if 0 < request.top_k < scores.shape[0]:
        bound = scores.topk(request.top_k).values[-1]
        scores = scores.masked_fill(scores < bound, float("-inf"))
    weights = scores.softmax(-1)
    if request.top_p < 1:
        ranked, order = weights.sort(descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked  # what better tokens hold already
        weights = weights.index_fill(0, order[before >= request.top_p], 0.0)
    sums = weights.cumsum(-1)
    point = torch.rand((), dtype=torch.float64, generator=generator) * sums[-1]
    index = int(torch.searchsorted(sums, point, right=True))
    last = int(weights.nonzero()[-1])  # rounding must not step onto a token of no weight
    return min(index, last)
