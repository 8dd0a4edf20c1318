"""Measures of labels: accuracy, and F1 over the labels, plain or weighted by how often each is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from postil.errors import JudgeError
from postil.judging.metrics.metric import Metric, Row, Statistics
from postil.judging.metrics.options import AnswerOptions, Given, LabelOptions, chosen
from postil.judging.metrics.text import said
from postil.judging.metrics.wanted import each, share, wanted

MOST_LABELS = 1000


def accuracy(given: Given) -> Metric:
    """The percentage of answers that are the wanted label (or one of several), blanks at either end aside."""
    options = chosen(AnswerOptions, given)
    return share(
        "accuracy", lambda answer, row: said(answer, options) in {said(text, options) for text in wanted(row)}
    )


def macro_f1(given: Given) -> Metric:
    """The mean over labels of F1 = 2·tp / (2·tp + fp + fn), in percent."""
    return Metric("macro_f1", "higher", "%", _counts(chosen(LabelOptions, given)), _f1(weighted=False))


def weighted_f1(given: Given) -> Metric:
    """As macro_f1, each label weighted by how many rows want it."""
    return Metric("weighted_f1", "higher", "%", _counts(chosen(LabelOptions, given)), _f1(weighted=True))


def _counts(options: LabelOptions) -> Callable[[Sequence[str], Sequence[Row]], Statistics]:
    """Statistics [rows, 3 · labels]: for each label whether the row has it right, answered it, wants it.

    The labels are those that the rows want, and `options.labels`. Any other answer is a miss of the wanted label and
    no label of its own (scikit-learn's f1_score with `labels` given).
    """

    def statistics(answers: Sequence[str], rows: Sequence[Row]) -> Statistics:
        pairs = each(answers, rows, lambda answer, row: (said(answer, options), _label(row, options)))
        names = sorted({label for _, label in pairs} | {label.strip() for label in options.labels})
        if len(names) > MOST_LABELS:
            raise JudgeError(
                f"the rows want {len(names):,} different answers, so they are hardly labels; F1 over labels takes up "
                f"to {MOST_LABELS:,}. Take another metric, for example bleu or exact_match"
            )
        column = {name: i for i, name in enumerate(names)}
        counts = np.zeros((len(rows), 3, len(names)))
        for i, (answer, label) in enumerate(pairs):
            counts[i, 2, column[label]] = 1
            if answer in column:
                counts[i, 1, column[answer]] = 1
                counts[i, 0, column[label]] = answer == label
        return counts.reshape(len(rows), -1)

    return statistics


def _label(row: Row, options: AnswerOptions) -> str:
    labels = {said(text, options) for text in wanted(row)}
    if len(labels) > 1:
        raise JudgeError(f"F1 over labels needs one label a row, and {sorted(labels)} are wanted; take accuracy")
    return labels.pop()


def _f1(*, weighted: bool) -> Callable[[Statistics], NDArray[np.float64]]:
    def value(sums: Statistics) -> NDArray[np.float64]:
        right, answered, wanting = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, -1), -2, 0)
        occurrences = answered + wanting  # 2·tp + fp + fn
        f1 = np.divide(2 * right, occurrences, out=np.zeros_like(right), where=occurrences > 0)
        weight = wanting if weighted else (occurrences > 0).astype(np.float64)  # a label that nobody used has no F1
        total, of = (f1 * weight).sum(axis=-1), weight.sum(axis=-1)
        mean: NDArray[np.float64] = np.divide(total, of, out=np.zeros_like(total), where=of > 0)
        return 100 * mean

    return value
