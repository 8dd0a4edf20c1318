"""Every measure of answers by its name, a user's own among them, and a guess at the one that fits a set of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from postil.errors import JudgeError, listed, nearest
from postil.judging.metrics.labels import accuracy, macro_f1, weighted_f1
from postil.judging.metrics.metric import Metric, Row
from postil.judging.metrics.number_answers import MARK, number
from postil.judging.metrics.options import Given
from postil.judging.metrics.own import is_own, own
from postil.judging.metrics.rouge import rouge_1, rouge_2, rouge_l, rouge_lsum
from postil.judging.metrics.sari import sari
from postil.judging.metrics.structure import is_json, json_schema, regex
from postil.judging.metrics.text import bleu, chrf, exact_match, normalised_match, token_f1
from postil.judging.metrics.tools import call_names, exact_calls, refusals, valid_calls, wants_call
from postil.judging.metrics.wanted import asked, calls_in, each, wanted

__all__ = ["METRICS", "asked", "default_metric", "metric_named", "wanted"]

METRICS: dict[str, Callable[[Given], Metric]] = {
    "exact_match": exact_match,
    "normalised_match": normalised_match,
    "token_f1": token_f1,
    "bleu": bleu,
    "chrf": chrf,
    "rouge_1": rouge_1,
    "rouge_2": rouge_2,
    "rouge_l": rouge_l,
    "rouge_lsum": rouge_lsum,
    "sari": sari,
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "weighted_f1": weighted_f1,
    "exact_calls": exact_calls,
    "call_names": call_names,
    "valid_calls": valid_calls,
    "refusals": refusals,
    "number": number,
    "json": is_json,
    "json_schema": json_schema,
    "regex": regex,
}

_PER_LABEL = 3  # rows a label has on average, at least, for answers to be labels
_LABEL_LENGTH = 60  # characters
_SHORT_WORDS = 3


def metric_named(name: str, options: Given | None = None) -> Metric:
    """The measure called `name` (a key of METRICS, or `path/to/file.py:function`) with its options.

    Raises JudgeError with the nearest name and all of them for an unknown one, and for options that it has not.
    """
    if is_own(name):
        return own(name, options or {})
    if name not in METRICS:
        raise JudgeError(
            f"unknown metric {name!r}{nearest(name, METRICS)}; known: {listed(METRICS, 30)}, "
            "or your own as path/to/file.py:function"
        )
    return METRICS[name](options or {})


def default_metric(rows: Sequence[Row]) -> tuple[str, str]:
    """The name of the measure that fits the rows best, and why, as words to tell the user ("the rows offer tools").

    Raises JudgeError for an empty set, and where a row has no answer to compare with.
    """
    if not rows:
        raise JudgeError("an empty set cannot be judged; it needs one row at least")
    if all(row.get("tools") or row.get("calls") for row in rows):
        if not any(each([""] * len(rows), rows, lambda _, row: wants_call(row))):
            return "refusals", "the rows offer tools and want no call"
        return "exact_calls", "the rows offer tools"
    answers = each([""] * len(rows), rows, lambda _, row: list(dict.fromkeys(wanted(row))))
    if all(calls_in(text) for texts in answers for text in texts):
        return "exact_calls", "the answers are calls"
    if any(len(texts) > 1 for texts in answers):
        if all(_short(text) for texts in answers for text in texts):
            return "exact_match", "the answers are short, and several count"
        return "bleu", "the rows have several references"
    texts = [one[0] for one in answers]
    if all(MARK in text for text in texts):
        return "number", f"the answers end in {MARK} and a number"
    distinct = {text.strip() for text in texts}
    if len(distinct) * _PER_LABEL <= len(texts) and all(_is_label(text) for text in distinct):
        one = "every answer is the same label" if len(distinct) == 1 else f"the answers are {len(distinct)} labels"
        return "accuracy", one
    if sum(map(_short, texts)) * 10 >= len(texts) * 9:
        return "exact_match", "the answers are short"
    return "bleu", "the answers are free text"


def _is_label(text: str) -> bool:
    return len(text) <= _LABEL_LENGTH and "\n" not in text


def _short(text: str) -> bool:
    return len(text.split()) <= _SHORT_WORDS
