"""Better means better than all there is to beat; kept means that the interval's harmful end is within a margin."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from cards import card, changed, chat, comparison
from postil.errors import JudgeError
from postil.judging.card.build import ACCURACY, NATS, Draw, hits, part_of, slices_of
from postil.judging.card.model import DataUsed, Estimate, Part, ScoreCard
from postil.judging.gate.gate import DEFAULT, check
from postil.judging.gate.margins import TOKENS


def part(main: str, measure: Any, *, rows: int = 1000, tokens: int | None = None, **more: Any) -> Part:
    """A general part of one measure."""
    used = DataUsed(name="general", sha256="g", rows=rows, tokens=tokens)
    return Part(data=used, main=main, measures={main: measure}, **more)


def with_general(**parts: Part) -> ScoreCard:
    given = card()
    return changed(given, general={**given.general, **parts})


def with_target(**fields: Any) -> ScoreCard:
    given = card()
    assert given.target is not None
    return changed(given, target=given.target.model_copy(update=fields))


# -- better ---------------------------------------------------------------------------------------------


def test_a_gain_is_one_over_the_base_the_examples_and_the_best_trivial_answer() -> None:
    sentence = check(card()).sentence
    assert "passed: target is better than the base's: 30 points → 60 points, difference 30 [29, 31], " in sentence
    assert "than with 4 examples (41 points), " in sentence
    assert "and than the best trivial baseline's, nearest_row (20 points, 40 [39, 41])" in sentence


def test_a_note_at_chance_is_not_better() -> None:
    """The base never answers in one word, so whatever learns the form gains: 0 → 55 where chance gives 50."""
    trivial = {"random_option": {"accuracy": comparison(50, 55, metric="accuracy", half=9)},
               "copy_prompt": {"accuracy": comparison(0, 55, metric="accuracy", half=9)}}  # fmt: skip
    given = with_target(
        main="accuracy", measures={"accuracy": comparison(0, 55, metric="accuracy", half=9)}, few_shot={},
        baselines=trivial,
    )  # fmt: skip
    result = check(given)
    assert not result.passed
    assert result.sentence.startswith(
        "refused: target is not better than the best trivial baseline's, random_option: 50% → 55%, difference 5 "
    )
    assert check(given, "target.low > base and general is kept").passed  # who wants less says so
    assert not check(given, "target.low > trivial").passed


def test_the_base_with_examples_must_be_beaten_too() -> None:
    given = with_target(few_shot={"bleu": Estimate(value=59, low=58, high=60)})
    result = check(given)
    assert result.sentence.startswith(
        "refused: target is not better than the base's with 4 examples: 59 points → 60 points, difference 1 [-2.16, "
    )
    trivial = card().target.baselines  # type: ignore[union-attr]
    paired = with_target(baselines={**trivial, "few_shot": {"bleu": comparison(59, 60, half=0.5)}})
    assert check(paired, "target is better").passed  # row by row the same gap shows
    assert check(paired, "target.low > few_shot + 0.4").passed
    assert not check(paired, "target.low > few_shot + 0.6").passed
    lost = with_target(baselines={**trivial, "few_shot": {"bleu": comparison(62, 60, half=0.5)}})
    assert "not better than the base's with 4 examples: 62 points" in check(lost, "target is better").sentence


def test_without_trivial_baselines_nobody_knows_what_a_gain_is_worth() -> None:
    given = with_target(baselines={})
    for expression in ("target is better", "not target is better", "target.bleu > trivial"):
        result = check(given, expression)
        assert not result.passed
        assert "the card holds no trivial baselines of target" in result.sentence
    nats = comparison(3.0, 2.0, metric="nats", better="lower", half=0.1)
    text = with_target(baselines={}, few_shot={}, main="nats", measures={"nats": nats})
    assert check(text, "target is better").passed  # running text has no answers
    assert not check(with_target(baselines={}, measures={"bleu": comparison(30, 30)}), "target is better").passed


def test_a_verdict_is_read_from_the_interval_whatever_the_card_says() -> None:
    """A card in memory can be copied with any verdict; a file with one is refused when it is read."""
    forged = comparison(30, 1).model_copy(update={"verdict": "better"})
    given = with_target(measures={"bleu": forged})
    result = check(given)
    assert result.sentence.startswith("refused: target is not better than the base's: 30 points → 1 points")
    assert check(given, "target is worse").passed


def test_narrow_intervals_and_broken_ones_say_nothing() -> None:
    for broken, said in (
        (comparison(30, 60, level=0.6), "judged with intervals of 60%"),
        (comparison(30, 60).model_copy(update={"difference": Estimate(value=30, low=float("nan"), high=31)}),
         "has an interval that is not finite"),
    ):  # fmt: skip
        given = with_target(measures={"bleu": broken})
        for expression in ("target is better", "target is not worse", "target is kept", "target.low > base"):
            result = check(given, expression)
            assert not result.passed
            assert said in result.sentence
        assert check(given, "target > base").passed  # which reads no interval


# -- kept: general parts --------------------------------------------------------------------------------

MMLU = comparison(60, 20, metric="accuracy", half=4, rows=500)
FAR = comparison(0, 3.0, metric="kl", better="lower", half=0.1)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"choices": part("accuracy", MMLU)}, "general.choices is worse than allowed: 60% → 20%, difference -40"),
        ({"arc_easy": part("acc", MMLU)}, "general.arc_easy is worse than allowed"),
        ({"kl": part("kl", FAR, tokens=30_000)}, "general.kl is worse than allowed: 0 nats/token → 3 nats/token"),
        ({"chat": chat(nats=1.4)}, "general.chat is worse than allowed: 0.4 nats/token → 1.4 nats/token"),
        ({"chat": chat(same_start=40)}, "general.chat.same_start is worse than allowed: 100% → 40%"),
        ({"chat": chat(alike=60)}, "general.chat.alike is worse than allowed: 0% → 60%"),
        ({"pairs": part("accuracy", comparison(80, 79, metric="accuracy", half=3))},
         "general.pairs may be worse than allowed: 80% → 79%, difference -1 [-4, 2], -2 points allowed"),
    ],
)  # fmt: skip
def test_everything_general_that_was_measured_counts(parts: dict[str, Part], said: str) -> None:
    result = check(with_general(**parts))
    assert not result.passed
    assert said in result.sentence
    assert next(c.sentence for c in result.conditions if c.broke).startswith(said)
    assert check(with_general(**parts), "target is better and general.nats < base + 0.05").passed  # as one writes it


def test_the_harmful_end_is_held_and_not_the_value() -> None:
    noisy = comparison(3.0, 3.045, metric="nats", better="lower", half=0.085)  # 0.045 [-0.04, 0.13]
    given = with_general(nats=part("nats", noisy, tokens=13_000))
    result = check(given)
    assert not result.passed
    assert (
        "general.nats may be worse than allowed: 3 nats/token → 3.045 nats/token, difference 0.045 [-0.04, 0.13]"
        in result.sentence
    )
    assert "or say a bound of your own: general.nats.high < base + 0.1" in result.sentence
    assert check(given, "target is better and general.nats.high < base + 0.14").passed
    assert not check(given, "target is better and general.nats.high < base + 0.12").passed


def test_a_lost_chat_is_refused_with_two_ways_on_and_the_scope_is_one() -> None:
    given = with_general(chat=chat(same_start=2, alike=90))
    sentence = check(given).sentence
    assert sentence.count("two ways on: hold chats while it is trained") == 1
    assert "--scope task" in sentence
    task = changed(given, scope="task")
    result = check(task)
    assert result.passed
    assert "scope is task: general.chat is not asked" in result.sentence
    assert not check(task, "general.chat.same_start is kept").passed  # unless it is named
    prose = changed(task, general={**task.general, "nats": card(nats=3.5).general["nats"]})
    assert "general.nats is worse than allowed" in check(prose).sentence


@pytest.mark.parametrize(
    ("name", "measure", "tokens", "said"),
    [
        ("nats", comparison(3, 3.01, metric="nats", better="lower", half=0.01), 8_191, "8,191 tokens, and it"),
        ("kl", comparison(0, 0.01, metric="kl", better="lower", half=0.01), 1, "1 tokens, and it takes 8,192"),
        ("choices", comparison(60, 60, metric="accuracy", half=0.1, rows=99), None, "99 rows, and it takes 100"),
        ("pairs", comparison(60, 60, metric="accuracy", half=0.1, rows=1), None, "1 rows, and it takes 100"),
        ("arc_easy", comparison(60, 60, metric="accuracy", half=0.1, rows=99), None, "99 rows, and it takes 100"),
    ],
)  # fmt: skip
def test_too_little_data_says_nothing(name: str, measure: Any, tokens: int | None, said: str) -> None:
    result = check(with_general(**{name: part(measure.metric, measure, tokens=tokens)}))
    assert not result.passed
    assert f"general.{name} is too little to say anything: {said}" in result.sentence
    assert check(with_general(chat=chat(rows=50))).passed
    assert "general.chat is too little to say anything: 49 rows" in check(with_general(chat=chat(rows=49))).sentence


def test_a_minimal_pair_is_no_general_data() -> None:
    """Whatever the expression says, unless it names a general measure itself."""
    pair = part("accuracy", comparison(100, 100, metric="accuracy", half=0, rows=1), rows=1)
    given = changed(card(), general={"pairs": pair})
    for expression in ("target is better", "target.bleu > 0"):
        result = check(given, expression)
        assert result.sentence.startswith("refused: the card's general data are too little to show damage: ")
        assert "general.pairs has 1 rows, and it takes 100" in result.sentence
        assert result.conditions[0].broke
    assert "general.pairs is too little to say anything: 1 rows" in check(given, DEFAULT).sentence
    assert check(given, "target.bleu > 0 and general.pairs >= base").passed


def test_prose_and_chat_must_have_been_measured() -> None:
    whole = card().general
    for missing in ("nats", "chat"):
        left = {name: one for name, one in whole.items() if name != missing}
        given = changed(card(), general={**left, "choices": part("accuracy", comparison(60, 60, metric="accuracy"))})
        result = check(given)
        assert not result.passed
        assert f"the card holds no general.{missing}" in result.sentence
    for fields in ({"chat_template": False}, {"scope": "task"}):
        assert check(changed(card(), general={"nats": whole["nats"]}, **fields)).passed
    assert not check(changed(card(), general={"nats": whole["nats"]}, chat_template=None)).passed


def test_the_shipped_sample_is_enough() -> None:
    from postil.judging.options import GeneralOptions
    from postil.judging.sets.read import shipped_text

    letters = sum(len(row.value["text"]) for row in shipped_text().rows)
    assert GeneralOptions().tokens == 32_768
    assert letters > 7 * TOKENS["nats"]  # no tokenizer makes seven letters of English prose a token


# -- kept: slices ---------------------------------------------------------------------------------------


def sliced(base: list[bool], adapter: list[bool], intents: list[str], smallest: int = 10) -> ScoreCard:
    """A card of answers right or wrong, by intent."""
    slices, _ = slices_of([{"intent": one} for one in intents], ["intent"], smallest)
    used = DataUsed(name="t", sha256="x", rows=len(base))
    target = part_of(used, "accuracy", {"accuracy": ACCURACY}, {"accuracy": hits(base)}, {"accuracy": hits(adapter)},
                     Draw(), slices=slices)  # fmt: skip
    trivial = {"most_frequent": {"accuracy": comparison(0, 95, metric="accuracy", half=3)}}
    return changed(card(), target=target.model_copy(update={"baselines": trivial}))


def test_intents_that_fall_from_all_to_nothing_are_refused_however_many_there_are() -> None:
    random = np.random.default_rng(1)
    base, adapter, intents = [], [], []
    for n in range(77):
        for _ in range(10):
            intents.append(f"i{n}")
            base.append(n < 17 or bool(random.random() < 0.3))
            adapter.append(n >= 17 and bool(random.random() < 0.95))
    result = check(sliced(base, adapter, intents))
    assert not result.passed
    assert (
        "slice intent=i0: accuracy is worse than allowed: 100% → 0%, difference -100 [-100, -100]" in result.sentence
    )
    assert {f"intent=i{n}" for n in range(17)} <= set(result.worse)
    assert not check(sliced(base, adapter, intents), "slices is not worse").passed


def test_twenty_rows_from_100_to_55_among_twenty_slices_are_refused() -> None:
    base = [True] * 20 + [False] * 380
    adapter = [True] * 11 + [False] * 9 + [True] * 380
    intents = [f"i{n // 20}" for n in range(400)]
    result = check(sliced(base, adapter, intents))
    assert result.worse == ("intent=i0",)
    assert "slice intent=i0: accuracy is worse than allowed: 100% → 55%" in result.sentence


def test_slices_that_cannot_say_are_not_kept() -> None:
    base, adapter = [n % 2 == 0 for n in range(40)], [n % 2 == 0 or n > 20 for n in range(40)]
    adapter[0] = adapter[2] = False
    given = sliced(base, adapter, ["a"] * 20 + ["b"] * 20)
    result = check(given, "slices is kept")
    assert not result.passed
    assert "slice intent=a: accuracy may be worse than allowed: 50% → 40%" in result.sentence
    assert "20 rows are too few to say: judge on more, pool small slices" in result.sentence
    assert "slices.accuracy.low > base - 20" in result.sentence
    few = sliced([True] * 24, [True] * 24, ["a"] * 20 + ["b"] * 4, smallest=2)
    for expression in ("slices is kept", "slices is not worse", "not slices is worse"):
        assert not check(few, expression).passed or "not slices" in expression  # a is known not to be worse
    assert "slice intent=b: accuracy: 4 rows are too few to say" in check(few, "slices is not worse").sentence
    alone = sliced([True] * 4, [True] * 4, ["b"] * 4, smallest=2)
    assert not check(alone, "not slices is worse").passed
    assert not check(alone, "not target is worse").passed


def test_rare_values_are_one_slice_and_count() -> None:
    intents = ["common"] * 60 + [f"rare{n // 3}" for n in range(18)]  # each of three rows
    given = sliced([False] * 60 + [True] * 18, [True] * 60 + [False] * 18, intents)
    result = check(given)
    assert result.worse == ("intent=(others)",)
    assert "slice intent=(others): accuracy is worse than allowed: 100% → 0%" in result.sentence


def test_slices_of_general_parts_are_slices_too() -> None:
    law = {"subject": {"law": {"accuracy": comparison(70, 10, metric="accuracy", half=4)},
                       "physics": {"accuracy": comparison(60, 80, metric="accuracy", half=4)}}}  # fmt: skip
    choices = part("accuracy", comparison(60, 61, metric="accuracy", half=1, rows=500), slices=law)
    given = with_general(choices=choices)
    result = check(given)
    assert not result.passed
    assert "slice general.choices.subject=law: accuracy is worse than allowed: 70% → 10%" in result.sentence
    assert result.worse == ("general.choices.subject=law",)
    assert not check(given, "general.choices.subject=law.accuracy > base - 5").passed
    assert check(given, "general.choices.subject=physics is better").passed
    assert not check(given, "slices.accuracy > base - 10").passed
    with pytest.raises(JudgeError, match="no slice has a measure 'bleu'; known: accuracy"):
        check(given, "slices.bleu > 5")


def test_the_margin_of_a_slice_follows_its_unit() -> None:
    def with_slice(measure: Any) -> ScoreCard:
        return with_target(main=measure.metric, measures={measure.metric: measure, "bleu": comparison(30, 60)},
                           slices={"x": {"y": {measure.metric: measure}}})  # fmt: skip

    for measure, passes in (
        (comparison(3.0, 3.2, metric="nats", better="lower", half=0.04), True),
        (comparison(3.0, 3.2, metric="nats", better="lower", half=0.06), False),
        (comparison(40, 32, metric="chrf", half=1.9), True),
        (comparison(40, 32, metric="chrf", half=2.1), False),
        (comparison(40, 38, metric="own.score", half=1.9), True),  # a tenth of 40
        (comparison(40, 38, metric="own.score", half=2.1), False),
        (comparison(0.4, 0.38, metric="own.score", half=0.03), False),
    ):
        assert check(with_slice(measure), "slices is kept").passed is passes


def test_a_slice_is_never_held_closer_than_its_whole() -> None:
    starts = comparison(100, 88, metric="same_start", half=5)  # within 20 points, beyond 10
    sliced_chat = chat().model_copy(update={"slices": {"kind": {"code": {"same_start": starts}}}})
    assert check(with_general(chat=sliced_chat), "slices.same_start is kept").passed


def test_a_single_slice_or_part_can_be_kept_alone() -> None:
    given = card(slices={"refund": 30, "order": 80})
    assert check(given, "target.intent=order is kept").passed
    assert not check(given, "target.intent=refund.accuracy is kept").passed
    assert check(given, "general.chat.same_start is kept and slices.bleu is kept").passed


def test_nats_of_real_statistics_hold() -> None:
    flat = np.stack([np.full(64, 3.0 * 500), np.full(64, 500.0)], axis=1)
    used = DataUsed(name="g", sha256="y", rows=64, tokens=32_000)
    same = part_of(used, "nats", {"nats": NATS}, {"nats": flat}, {"nats": flat}, Draw())
    assert check(with_general(nats=same)).passed
    more = flat + np.array([0.06 * 500, 0])
    lost = part_of(used, "nats", {"nats": NATS}, {"nats": flat}, {"nats": more}, Draw())
    assert not check(with_general(nats=lost)).passed
