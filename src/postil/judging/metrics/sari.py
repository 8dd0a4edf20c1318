"""SARI: how well an answer adds, keeps and deletes the words of its source, as its references do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from postil.judging.metrics.metric import Metric, Row
from postil.judging.metrics.options import Given, SariOptions, chosen
from postil.judging.metrics.wanted import asked, column_of, points, wanted

ORDERS = 4
Grams = Counter[tuple[str, ...]]


def sari(given: Given) -> Metric:
    """SARI (Xu et al. 2016): the mean over rows of the sentence score, n-grams of order 1 to 4.

    There are three reference implementations, and this is the one that Hugging Face's `evaluate` and tensor2tensor
    have: text lower-cased and split by sacrebleu's 13a tokenizer, 0/0 counts as 1 (in the authors' own script as 0,
    so that there even the reference itself can have less than 100), and recall of what is kept is taken over counts.
    EASSE sums counts over the corpus instead, so its values are others. Each reference has a vote, equal ones too.

    The source is the text to be simplified and no instruction: a column (`source`), or the `input` beside an
    `instruction`. Where neither is there it is the whole prompt, and the card says so.
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    options = chosen(SariOptions, given)
    tokenize: Callable[[str], str] = Tokenizer13a()

    def words(text: str) -> list[str]:
        return tokenize(text.lower()).split(" ")

    def source(row: Row) -> str:
        return str(column_of(row, options.source)) if options.source else _input(row) or asked(row)

    def look(rows: Sequence[Row]) -> list[str]:
        if options.source or all(map(_input, rows)):
            return []
        return [
            "sari: the source is the whole prompt, and what it tells the model to do counts as words to keep or "
            "delete; where the text stands alone in a column, name it with metric_options.sari.source"
        ]

    return points(
        "sari",
        lambda answer, row: sentence_sari(words(source(row)), words(answer), [words(text) for text in wanted(row)]),
        look,
    )


def _input(row: Row) -> str:
    """The text of an Alpaca row that comes with an instruction; empty where there is none."""
    given = row.get("input") if isinstance(row.get("instruction"), str) else None
    return given.strip() if isinstance(given, str) else ""


def sentence_sari(source: Sequence[str], answer: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """SARI of one answer, 0 to 1: F1 of added, F1 of kept and precision of deleted words, their mean over orders."""
    total = 0.0
    for order in range(1, ORDERS + 1):
        grams = Counter(gram for reference in references for gram in _grams(reference, order))
        source_grams, answer_grams = Counter(_grams(source, order)), Counter(_grams(answer, order))
        copies = len(references)  # each reference votes, so source and answer count once per reference
        total += _added(source_grams, answer_grams, grams)
        total += _kept(_times(source_grams, copies), _times(answer_grams, copies), grams)
        total += _deleted(_times(source_grams, copies), _times(answer_grams, copies), grams)
    return total / (3 * ORDERS)


def _grams(words: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]


def _times(grams: Grams, factor: int) -> Grams:
    return Counter({gram: factor * count for gram, count in grams.items()})


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _added(source: Grams, answer: Grams, references: Grams) -> float:
    """F1 over kinds of n-grams that are not in the source."""
    added, right = answer.keys() - source.keys(), references.keys() - source.keys()
    both = len(added & right)
    return _f1(_share(both, len(added)), _share(both, len(right)))


def _kept(source: Grams, answer: Grams, references: Grams) -> float:
    """F1 over n-grams of the source that are still there; precision per kind, recall per count."""
    kept, right = source & answer, source & references
    both = kept & right
    precision = _share(sum(both[gram] / kept[gram] for gram in both), len(kept))
    return _f1(precision, _share(both.total(), right.total()))


def _deleted(source: Grams, answer: Grams, references: Grams) -> float:
    """Precision per kind over n-grams of the source that are gone."""
    deleted = source - answer
    right = deleted - references
    return _share(sum(right[gram] / deleted[gram] for gram in right), len(deleted))
