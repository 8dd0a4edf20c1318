"""A coloured view of samples: which text has loss, which is masked, and how many tokens each is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from rich.console import Group
from rich.panel import Panel
from rich.text import Text

from postil.data.packs import Sample

LEARNED, WEIGHTED, MASKED = "bold green", "bold yellow", "dim"
MARKS = ("⟦", "⟧")


def show_samples(samples: Iterable[Sample], tokenizer: Any, *, marks: bool = False) -> list[Group | Panel]:
    """A legend and one panel a sample, to print with a rich console.

    Green has loss of weight 1, yellow of another weight, dim is masked. With `marks`, learned text also
    stands between ⟦ and ⟧, for places without colour.
    """
    legend = Text.assemble(
        ("learned", LEARNED),
        "  ",
        ("learned, with a weight that is not 1", WEIGHTED),
        "  ",
        ("masked", MASKED),
    )
    return [Group(legend), *(_panel(sample, tokenizer, marks) for sample in samples)]


def _panel(sample: Sample, tokenizer: Any, marks: bool) -> Panel:
    body = Text()
    for text, weight in runs(sample, tokenizer):
        style = MASKED if weight == 0 else LEARNED if weight == 1 else WEIGHTED
        body.append(f"{MARKS[0]}{text}{MARKS[1]}" if marks and weight else text, style=style)
    total, learned = len(sample.ids), sample.target_tokens
    title = f"row {sample.row}: {total:,} tokens, {learned:,} learned, {total - learned:,} masked"
    return Panel(body, title=title + (", cut" if sample.truncated else ""), title_align="left")


def runs(sample: Sample, tokenizer: Any) -> list[tuple[str, float]]:
    """(text, weight) of each run of tokens with one weight; joined they are the whole decoded text."""
    borders = np.flatnonzero(np.diff(sample.weights)) + 1
    result: list[tuple[str, float]] = []
    before = ""
    for start, end in zip([0, *borders.tolist()], [*borders.tolist(), len(sample.ids)], strict=True):
        # decoded from the start, because a tokenizer may drop the space before a text's first token
        decoded: str = tokenizer.decode(sample.ids[:end].tolist(), clean_up_tokenization_spaces=False)
        result.append((decoded[len(before) :], float(sample.weights[start])))
        before = decoded
    return result
