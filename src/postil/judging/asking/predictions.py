"""Every prediction of a judging as JSONL: answers of base and adapter with their statistics, and likelihoods."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from postil.engine import Answer
from postil.files import write_text
from postil.judging.asking.likelihoods import Losses
from postil.judging.card.build import Measured
from postil.judging.sets.general import General
from postil.judging.sets.target import Target

WIDEST = 32  # numbers of a row's statistics that are written; F1 over many labels has more

Side = tuple[Losses, Mapping[str, Sequence[Losses]]]  # each target item's (nats, tokens); each option's, by set


def lines_of(
    target: Target | None,
    general: General,
    answers: Mapping[str, Sequence[Answer]],
    measured: Mapping[str, Measured],
    sides: Mapping[str, Side],
    shots: int,
) -> Iterator[dict[str, Any]]:
    """One object a question and a side ("base", "adapter", "few-shot": the base with `shots` examples).

    Of the target: set, row (its first line), rows, side, prompt, references, and answer with statistics (each
    measure's, whose sum over rows gives the value), finish_reason and, but for few-shot, nats and tokens of the
    references. Of choices and pairs: the nats and tokens of every option, and the place of the right one.
    """
    if target is not None:
        for n, item in enumerate(target.items):
            for side in dict.fromkeys([*sides, *answers]):
                line: dict[str, Any] = {"set": "target", "row": item.rows[0], "rows": list(item.rows), "side": side}
                if side in sides:
                    line["nats"], line["tokens"] = sides[side][0][n]
                if target.answers:
                    line |= {"prompt": item.prompt, "references": item.value["references"]}
                if side in answers:
                    answer = answers[side][n]
                    line |= {"answer": answer.text.strip(), "finish_reason": answer.finish_reason}
                    line["statistics"] = {
                        name: stats[n].tolist() for name, stats in measured[side].items() if stats.shape[1] <= WIDEST
                    }
                if side == "few-shot":
                    line["shots"] = shots
                yield line
    for name, found in general.sets.items():
        for side, (_, options) in sides.items():
            for row, losses, right in zip(found.rows, options[name], found.right, strict=True):
                yield {
                    "set": name, "row": row.number, "side": side, "right": right,
                    "nats": [total for total, _ in losses], "tokens": [count for _, count in losses],
                }  # fmt: skip


def write_predictions(path: str | Path, lines: Iterator[dict[str, Any]]) -> None:
    """Write the lines at once. Raises StorageError."""
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
