"""Measures of labels: accuracy, and F1 over the labels as scikit-learn has it, plain or weighted by their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from postil.errors import JudgeError, nearest
from postil.judging.metrics.metric import Metric, Row, Statistics
from postil.judging.metrics.options import AnswerOptions, Given, LabelOptions, chosen
from postil.judging.metrics.text import exact_match, said
from postil.judging.metrics.wanted import each, wanted

MOST_LABELS = 1000
MOST_ROWS = 4000  # whose answers are kept apart, each in a column


def accuracy(given: Given) -> Metric:
    """exact_match under the name that it has for labels: the percentage of answers that are the wanted label (or one
    of several), blanks at either end aside."""
    return replace(exact_match(given), name="accuracy")


def macro_f1(given: Given) -> Metric:
    """The mean over labels of F1 = 2·tp / (2·tp + fp + fn), in percent: scikit-learn's f1_score(average="macro").

    With `labels` it is that of these labels, one that nobody wants or answers being 0. Without, the labels are those
    wanted and those answered: a base that answers in sentences has as many labels more. others="miss" leaves these
    out (f1_score's labels=sorted(set(wanted))). In a resample or slice, a wanted label without any row there does not
    count.
    """
    options = chosen(LabelOptions, given)
    return Metric("macro_f1", "higher", "%", _counts(options, strangers=True), _f1(weighted=False))


def weighted_f1(given: Given) -> Metric:
    """As macro_f1, each label weighted by how many rows want it: f1_score(average="weighted")."""
    options = chosen(LabelOptions, given)
    return Metric("weighted_f1", "higher", "%", _counts(options, strangers=False), _f1(weighted=True))


def _counts(options: LabelOptions, *, strangers: bool) -> Callable[[Sequence[str], Sequence[Row]], Statistics]:
    """Statistics [rows, 3 + 3 · labels + strangers].

    First 1, the number of labels that the rows want, and that of labels beyond these, the same in every row; then for
    each label wanted whether the row has it right, answered it, wants it. Without a list of labels any other answer
    is a label of its own to macro F1: it has the column of the first row with that answer.
    """
    known = {said(label, options) for label in options.labels}

    def statistics(answers: Sequence[str], rows: Sequence[Row]) -> Statistics:
        pairs = each(answers, rows, lambda answer, row: (said(answer, options), _label(row, options, known)))
        names = sorted({label for _, label in pairs})
        if len(names) > MOST_LABELS:
            raise JudgeError(
                f"the rows want {len(names):,} different answers, so they are hardly labels; F1 over labels takes up "
                f"to {MOST_LABELS:,}. Take another metric, for example bleu or exact_match"
            )
        own = strangers and not known and options.others == "labels"
        if own and len(rows) > MOST_ROWS:
            raise JudgeError(
                f"macro_f1 keeps any answer apart for up to {MOST_ROWS:,} rows, and here are {len(rows):,}; give the "
                "labels (metric_options.macro_f1.labels), or others=miss"
            )
        column = {name: i for i, name in enumerate(names)}
        counts = np.zeros((len(rows), 3, len(names)))
        others = np.zeros((len(rows), len(rows) if own else 0))
        first: dict[str, int] = {}
        for i, (answer, label) in enumerate(pairs):
            counts[i, 2, column[label]] = 1
            if answer in column:
                counts[i, 1, column[answer]] = 1
                counts[i, 0, column[label]] = answer == label
            elif own:
                others[i, first.setdefault(answer, i)] = 1
        sizes = np.tile(np.array([1.0, len(names), len(known - set(names))]), (len(rows), 1))
        return np.concatenate([sizes, counts.reshape(len(rows), -1), others], axis=1)

    return statistics


def _label(row: Row, options: AnswerOptions, known: Set[str]) -> str:
    labels = {said(text, options) for text in wanted(row)}
    if len(labels) > 1:
        raise JudgeError(f"F1 over labels needs one label a row, and {sorted(labels)} are wanted; take accuracy")
    label = labels.pop()
    if known and label not in known:
        raise JudgeError(f"the row wants {label!r}, which is none of the labels given{nearest(label, known)}")
    return label


def _f1(*, weighted: bool) -> Callable[[Statistics], NDArray[np.float64]]:
    def value(sums: Statistics) -> NDArray[np.float64]:
        rows = np.maximum(sums[..., 0], 1)
        labels, beyond = (np.rint(sums[..., column] / rows) for column in (1, 2))
        end = 3 + 3 * int(labels.max(initial=0))
        counts, strangers = sums[..., 3:end], sums[..., end:]
        right, answered, wanting = np.moveaxis(counts.reshape(*sums.shape[:-1], 3, -1), -2, 0)
        occurrences = answered + wanting  # 2·tp + fp + fn
        f1 = np.divide(2 * right, occurrences, out=np.zeros_like(right), where=occurrences > 0)
        weight = wanting if weighted else (occurrences > 0).astype(np.float64)
        total, of = (f1 * weight).sum(axis=-1), weight.sum(axis=-1)
        if not weighted:
            of = of + beyond + (strangers > 0).sum(axis=-1)  # nobody is right about these
        mean: NDArray[np.float64] = np.divide(total, of, out=np.zeros_like(total), where=of > 0)
        return 100 * mean

    return value
