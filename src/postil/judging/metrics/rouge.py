"""ROUGE: how many words, pairs of words, and words in order an answer shares with its best reference."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from postil.judging.metrics.metric import Metric
from postil.judging.metrics.options import Given, NoOptions, chosen
from postil.judging.metrics.wanted import points, wanted

Words = Sequence[str]
_WORD = re.compile(r"[^\W_]+")


def rouge_1(given: Given) -> Metric:
    """ROUGE-1 F1 (Lin 2004, section 2): shared words, each as often as both have it.

    All ROUGE measures are means over rows, each against its best reference. Words are runs of letters and digits in
    lower case, without stemming: on ASCII text the values are those of the rouge-score package; unlike it, letters
    beyond ASCII count, and a reference without words is met by an equal answer.
    """
    return _rouge("rouge_1", given, lambda answer, reference: _grams_f1(answer, reference, 1))


def rouge_2(given: Given) -> Metric:
    """ROUGE-2 F1: shared pairs of neighbouring words."""
    return _rouge("rouge_2", given, lambda answer, reference: _grams_f1(answer, reference, 2))


def rouge_l(given: Given) -> Metric:
    """ROUGE-L F1 (section 3.1): the longest common subsequence of words."""
    return _rouge("rouge_l", given, rouge_l_f1)


def rouge_lsum(given: Given) -> Metric:
    """ROUGE-L F1 of whole summaries (section 3.2): for each sentence (a line) of the reference the union of its
    longest common subsequences with all sentences of the answer."""
    return _rouge("rouge_lsum", given, _summary_f1)


def _rouge(name: str, given: Given, f1: Callable[[str, str], float]) -> Metric:
    chosen(NoOptions, given)

    def score(answer: str, reference: str) -> float:
        return f1(answer, reference) if _WORD.search(reference) else float(answer.strip() == reference.strip())

    return points(name, lambda answer, row: max(score(answer, text) for text in wanted(row)))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _f1(common: int, ours: int, theirs: int) -> float:
    if not common:
        return 0.0
    precision, recall = common / ours, common / theirs
    return 2 * precision * recall / (precision + recall)  # Lin 2004, equation 4 with β = 1


def _grams_f1(answer: str, reference: str, order: int) -> float:
    ours, theirs = (Counter(_grams(_words(text), order)) for text in (answer, reference))
    return _f1((ours & theirs).total(), ours.total(), theirs.total())


def _grams(words: Words, order: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]


def rouge_l_f1(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of two texts' words; 0 where either has none."""
    ours, theirs = _words(answer), _words(reference)
    return _f1(len(_subsequence(theirs, ours)), len(ours), len(theirs))


def _summary_f1(answer: str, reference: str) -> float:
    """As release 1.5.5 of the original script has it, no word counts more often than either text holds it."""
    ours, theirs = ([_words(line) for line in text.split("\n")] for text in (answer, reference))
    left = Counter(word for line in ours for word in line) & Counter(word for line in theirs for word in line)
    hits = 0
    for sentence in theirs:
        for place in sorted({place for line in ours for place in _subsequence(sentence, line)}):
            if left[sentence[place]]:
                left[sentence[place]] -= 1
                hits += 1
    return _f1(hits, sum(map(len, ours)), sum(map(len, theirs)))


def _subsequence(words: Words, other: Words) -> list[int]:
    """The places in `words` of a longest common subsequence with `other`; of several, the package's."""
    table = [[0] * (len(other) + 1) for _ in range(len(words) + 1)]
    for i, word in enumerate(words):
        for j, one in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if word == one else max(table[i][j + 1], table[i + 1][j])
    places, i, j = [], len(words), len(other)
    while i and j:
        if words[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            places.append(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places[::-1]
