"""Trivial baselines: what needs no learning, scored like the adapter, so that a gain over them means something."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from postil import seeds
from postil.data.digests import WORDS
from postil.data.formats import Chat, Pair, Text
from postil.errors import JudgeError
from postil.judging.bootstrap import compare
from postil.judging.card.build import Draw, Measured
from postil.judging.card.model import FEW_SHOT, Comparison
from postil.judging.metrics import METRICS
from postil.judging.metrics.metric import Metric, Row, Statistics, mean_of
from postil.judging.probes.choices import own_options
from postil.judging.sets.examples import Training
from postil.judging.sets.target import Item, Target

Baselines = dict[str, dict[str, Comparison]]  # by name and measure; a Comparison's `base` is the baseline's


@dataclass(frozen=True, slots=True)
class Answers:
    """One answer a question, or several of which one is taken by chance."""

    texts: tuple[tuple[str, ...], ...]

    @classmethod
    def single(cls, texts: Sequence[str]) -> Answers:
        """One answer a question."""
        return cls(tuple((text.strip(),) for text in texts))


def beside_baselines(
    target: Target,
    training: Training | None,
    metrics: Mapping[str, Metric],
    adapter: Measured,
    few_shot: Measured,
    draw: Draw,
) -> tuple[Baselines, list[str]]:
    """The adapter beside each baseline by each measure, paired by question, and notes.

    few_shot: the base's statistics with examples before each question; none where it was not asked so. Of a random
    option a mean has its expectation, question by question; any other measure has a seeded draw. A user's own measure
    that fails on a baseline's answer takes it as an empty one.
    """
    out, notes = Baselines(), list[str]()

    def put(name: str, measure: str, found: Statistics) -> None:
        out.setdefault(name, {})[measure] = compare(
            metrics[measure], found, adapter[measure], seed=draw.seed, resamples=draw.resamples, level=draw.level
        )

    for measure, found in few_shot.items():
        put(FEW_SHOT, measure, found)
    for name, answers in trivial_answers(target, training).items():
        for measure, metric in metrics.items():
            try:
                put(name, measure, _statistics(metric, answers, target.values, draw.seed))
            except JudgeError as problem:
                notes.append(f"baseline {name} has no {measure}: {problem}")
    return out, notes


def trivial_answers(target: Target, training: Training | None) -> dict[str, Answers]:
    """What each trivial baseline says to the target's questions.

    most_frequent: the commonest answer of the training rows, else of the target's own (all of them: leaving out each
    question's own would turn equal shares into 0%). random_option: of the row's own options, else of the labels,
    where the answers are some. copy_prompt, copy_last_line: the prompt, or a chat's last user turn, and its last
    line. nearest_row: the answer of the training row whose prompt is most like (BM25).
    """
    learned = [one.references[0] for one in training.examples] if training is not None else []
    known = learned or [text for item in target.items for text in item.value["references"]]
    asked = [_last_asked(item) for item in target.items]
    lines = [[line for line in text.splitlines() if line.strip()] for text in asked]
    out = {
        "most_frequent": Answers.single([_commonest(known)] * len(asked)),
        "copy_prompt": Answers.single(asked),
        "copy_last_line": Answers.single([found[-1] if found else "" for found in lines]),
    }
    options = own_options([(item.value, text) for item, text in zip(target.items, asked, strict=True)], known)
    if options is not None:
        out["random_option"] = Answers(tuple(options))
    if training is not None:
        out["nearest_row"] = Answers.single(_nearest(target, training))
    return out


def _commonest(texts: Sequence[str]) -> str:
    """The commonest text, blanks at either end aside; of equally common ones the first."""
    return Counter(text.strip() for text in texts).most_common(1)[0][0]


def _last_asked(item: Item) -> str:
    """The prompt, or a conversation's last user turn."""
    example = item.example
    if not isinstance(example, Chat):
        return example.prompt if isinstance(example, Pair) else ""
    return next((turn["content"] for turn in reversed(example.messages[:-1]) if turn["role"] == "user"), "")


def _whole_question(example: Chat | Pair | Text) -> str:
    """All that a row asks, without its system turn."""
    if not isinstance(example, Chat):
        return example.prompt if isinstance(example, Pair) else ""
    return "\n".join(turn["content"] for turn in example.messages[:-1] if turn["role"] != "system")


def _nearest(target: Target, training: Training) -> list[str]:
    """The answer of the training row that asks what is most like each question (BM25, Robertson and Zaragoza 2009,
    with k1 = 1.5 and b = 0.75); the first of equally like ones."""
    from bm25s import BM25

    answers: dict[str, str] = {}
    for one in training.examples:
        answers.setdefault(_whole_question(one.example), one.references[0])
    index = BM25(k1=1.5, b=0.75)
    index.index([_words(text) for text in answers], show_progress=False)
    places = {text: place for place, text in enumerate(answers)}
    out, said = [], list(answers.values())
    for item in target.items:
        text = _whole_question(item.example)
        words = [word for word in _words(text) if word in index.vocab_dict]
        best = int(np.argmax(index.get_scores(words))) if words else 0
        out.append(said[places.get(text, best)])  # a question that was learned is the most like itself
    return out


def _words(text: str) -> list[str]:
    """The words of a text in lower case; its characters where it has none."""
    return WORDS.findall(text.lower()) or [letter for letter in text if not letter.isspace()] or [""]


def _statistics(metric: Metric, answers: Answers, rows: Sequence[Row], seed: int) -> Statistics:
    counts = [len(texts) for texts in answers.texts]
    if max(counts) == 1 or metric.value is not mean_of or metric.name not in METRICS:
        generator = np.random.Generator(np.random.PCG64(seeds.derive(seed, "random option")))
        places = generator.integers(0, counts)
        return _scored(metric, [texts[n] for texts, n in zip(answers.texts, places, strict=True)], rows)
    flat = [text for texts in answers.texts for text in texts]
    repeated = [row for row, count in zip(rows, counts, strict=True) for _ in range(count)]
    firsts = np.cumsum([0, *counts[:-1]])
    sums: Statistics = np.add.reduceat(_scored(metric, flat, repeated), firsts, axis=0)
    return sums / np.array(counts, dtype=np.float64)[:, None]


def _scored(metric: Metric, answers: Sequence[str], rows: Sequence[Row]) -> Statistics:
    try:
        return metric.statistics(list(answers), list(rows))
    except JudgeError:
        if metric.name in METRICS:
            raise
    readable = [text if _reads(metric, text, row) else "" for text, row in zip(answers, rows, strict=True)]
    return metric.statistics(readable, list(rows))


def _reads(metric: Metric, answer: str, row: Row) -> bool:
    try:
        metric.statistics([answer], [row])
    except JudgeError:
        return False
    return True
