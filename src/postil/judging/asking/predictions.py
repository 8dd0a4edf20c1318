"""Every prediction of a judging as JSONL: answers of base and adapter with their statistics, and likelihoods."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from postil.engine import Answer
from postil.errors import StorageError
from postil.files import write_text
from postil.judging.asking.likelihoods import Losses
from postil.judging.card.build import Measured
from postil.judging.sets.general import General
from postil.judging.sets.target import Item, Target

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
                    line |= _said(answers[side][n])
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


def answer_line(item: Item, side: str, answer: Answer) -> dict[str, Any]:
    """The line of an answer while the judging goes on, before it is measured."""
    line: dict[str, Any] = {"set": "target", "row": item.rows[0], "rows": list(item.rows), "side": side}
    return line | {"prompt": item.prompt, "references": item.value["references"]} | _said(answer)


def _said(answer: Answer) -> dict[str, Any]:
    return {"answer": answer.text.strip(), "finish_reason": answer.finish_reason}


@contextmanager
def as_they_come(path: str | Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield what appends a line to PATH.partial, each with the system at once; the file goes when the block ends well
    and stays, with every answer so far, when it is left by an error or Ctrl-C. None: lines go nowhere.

    Raises StorageError where nothing can be written there, before the work.
    """
    if path is None:
        yield lambda _: None
        return
    partial = Path(f"{path}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        handle = partial.open("w", encoding="utf-8")
    except OSError as problem:
        raise _refused(partial, problem) from problem

    def add(line: dict[str, Any]) -> None:
        try:
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
            handle.flush()
        except OSError as problem:
            raise _refused(partial, problem) from problem

    with handle:
        yield add
    partial.unlink(missing_ok=True)


def _refused(path: Path, problem: OSError) -> StorageError:
    return StorageError(f"{path} could not be written ({problem.strerror}); free some space, or choose another place")


def write_predictions(path: str | Path, lines: Iterator[dict[str, Any]]) -> None:
    """Write the lines at once. Raises StorageError."""
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
