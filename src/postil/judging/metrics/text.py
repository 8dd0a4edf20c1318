"""Measures of an answer's words: exact and normalised match, token F1, BLEU and chrF by sacrebleu."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from postil.judging.metrics.metric import Metric, Row, Statistics
from postil.judging.metrics.options import AnswerOptions, BleuOptions, ChrfOptions, Given, chosen
from postil.judging.metrics.wanted import each, points, share, wanted

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def said(answer: str, options: AnswerOptions) -> str:
    """The stripped answer, or its first line."""
    text = answer.strip()
    return text.split("\n", 1)[0].rstrip() if options.first_line else text


def exact_match(given: Given) -> Metric:
    """The percentage of answers that equal a reference, blanks at either end aside."""
    options = chosen(AnswerOptions, given)
    return share(
        "exact_match", lambda answer, row: said(answer, options) in {said(text, options) for text in wanted(row)}
    )


def normalised(text: str) -> str:
    """Lower case, without punctuation, English articles and spare blanks (Rajpurkar et al. 2016, section 6.1)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def normalised_match(given: Given) -> Metric:
    """The percentage of answers that equal a reference once both are `normalised`."""
    options = chosen(AnswerOptions, given)
    return share(
        "normalised_match",
        lambda answer, row: normalised(said(answer, options)) in {normalised(text) for text in wanted(row)},
    )


def token_f1(given: Given) -> Metric:
    """SQuAD's F1: of the words of answer and reference once both are `normalised`, against the best reference.

    Rows are means. Where either has no word, they must be equal (version 2.0 of its script).
    """
    options = chosen(AnswerOptions, given)
    return points("token_f1", lambda answer, row: max(_words_f1(said(answer, options), text) for text in wanted(row)))


def _words_f1(answer: str, reference: str) -> float:
    ours, theirs = Counter(normalised(answer).split()), Counter(normalised(reference).split())
    if not ours or not theirs:
        return float(ours == theirs)
    common = (ours & theirs).total()
    if not common:
        return 0.0
    precision, recall = common / ours.total(), common / theirs.total()
    return 2 * precision * recall / (precision + recall)


def bleu(given: Given) -> Metric:
    """Corpus BLEU (Papineni et al. 2002) from sacrebleu's counts, with as many references as each row has.

    Statistics [rows, 10]: length, nearest reference length, matched and total n-grams of order 1 to 4. Their sum
    through sacrebleu's own formula is corpus_bleu, to the last bit. An empty reference, which sacrebleu leaves out,
    is one of length 0: whatever is answered to it is too much.
    """
    from sacrebleu.metrics import BLEU

    options = chosen(BleuOptions, given)
    scorer = BLEU(lowercase=options.lowercase, tokenize=options.tokenize, smooth_method=options.smooth, force=True)

    def score(sums: NDArray[np.float64]) -> float:
        whole = [int(count) for count in sums]
        return float(
            BLEU.compute_bleu(
                whole[2:6], whole[6:], sys_len=whole[0], ref_len=whole[1], smooth_method=options.smooth
            ).score
        )

    return Metric("bleu", "higher", "points", _sacrebleu(scorer), lambda sums: _by_score(sums, score))


def chrf(given: Given) -> Metric:
    """Corpus chrF (Popović 2015), chrF++ with word_order 2, from sacrebleu's counts; the best reference per row.

    Statistics [rows, 3 · orders]: n-grams of the answer, of the reference, and of both, for each order. Their sum
    through sacrebleu's own formula is corpus_chrf, to the last bit. To an empty reference, which sacrebleu leaves
    out, an empty answer is right and any other n-gram wrong.
    """
    from sacrebleu.metrics import CHRF

    options = chosen(ChrfOptions, given)
    scorer = CHRF(options.char_order, options.word_order, options.beta, lowercase=options.lowercase)

    def score(sums: NDArray[np.float64]) -> float:
        return float(scorer._compute_f_score([int(count) for count in sums]))

    return Metric("chrf", "higher", "points", _chrf(scorer), lambda sums: _by_score(sums, score))


def _sacrebleu(scorer: Any) -> Callable[[Sequence[str], Sequence[Row]], Statistics]:
    """The statistics that a scorer of sacrebleu would sum: rows with fewer references are filled up with None."""

    def statistics(answers: Sequence[str], rows: Sequence[Row]) -> Statistics:
        references = each(answers, rows, lambda _, row: [text or " " for text in wanted(row)])  # "" would be dropped
        most = max(map(len, references), default=1)
        streams = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
        counts = scorer._extract_corpus_statistics(list(answers), streams) if rows else []
        return np.array(counts, dtype=np.float64)

    return statistics


def _chrf(scorer: Any) -> Callable[[Sequence[str], Sequence[Row]], Statistics]:
    """As _sacrebleu; n-grams of an answer to a blank reference count, which are left out there."""
    counted = _sacrebleu(scorer)

    def statistics(answers: Sequence[str], rows: Sequence[Row]) -> Statistics:
        counts = counted(answers, rows)
        blank = [n for n, row in enumerate(rows) if any(not text.strip() for text in wanted(row))]
        for n in blank:
            if not answers[n].strip():
                counts[n] = 0  # met by the blank reference: nothing was wanted, and nothing is wrong
            elif not counts[n].any():  # no other reference shares anything with it
                itself = scorer._extract_corpus_statistics([answers[n]], [[answers[n]]])
                counts[n, ::3] = itself[0][::3]
        return counts

    return statistics


def _by_score(sums: Statistics, score: Callable[[NDArray[np.float64]], float]) -> NDArray[np.float64]:
    """score over the last axis: sums [..., k] to values [...]."""
    flat = sums.reshape(-1, sums.shape[-1])
    return np.array([score(one) for one in flat]).reshape(sums.shape[:-1])
