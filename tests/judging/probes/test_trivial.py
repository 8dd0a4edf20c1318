"""Trivial baselines: what each says, how each is scored beside the adapter, and the verdict that they leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from postil.base import Base
from postil.data import DataOptions
from postil.judging.bootstrap import compare
from postil.judging.card.build import Draw
from postil.judging.card.model import Comparison, DataUsed, Estimate, Part, verdict_of
from postil.judging.metrics import metric_named
from postil.judging.metrics.metric import Metric
from postil.judging.probes.trivial import Baselines, beside_baselines, trivial_answers
from postil.judging.sets.examples import Training, read_training
from postil.judging.sets.target import Target, read_target

RAW = DataOptions(format="raw")


def target_of(rows: list[dict[str, Any]], base: Base, options: DataOptions = RAW) -> Target:
    return read_target(rows, base, options)


def learned(rows: list[dict[str, Any]], target: Target) -> Training:
    found, _ = read_training(rows, target.options, target.format, asked_for=True)
    assert found is not None
    return found


def said(target: Target, training: Training | None = None) -> dict[str, list[tuple[str, ...]]]:
    return {name: list(found.texts) for name, found in trivial_answers(target, training).items()}


def beside(target: Target, answers: list[str], *names: str, training: Training | None = None, few: Any = ()) -> Any:
    """Baselines, notes and the adapter's value of each measure, for an adapter that gives `answers`."""
    metrics: dict[str, Metric] = {}
    for name in names:
        metric = metric_named(name)
        metrics[metric.name] = metric
    mine = {name: metric.statistics(answers, target.values) for name, metric in metrics.items()}
    shots = {name: metric.statistics(list(few), target.values) for name, metric in metrics.items()} if few else {}
    found, notes = beside_baselines(target, training, metrics, mine, shots, Draw(resamples=200))
    return found, notes


def pair(prompt: str, completion: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion} | more


def test_what_the_baselines_say(base: Base) -> None:
    target = target_of(
        [pair("red or blue?\n\nsky over sea\n", "blue"), pair("red or blue?\n\nripe plum", "red")], base
    )
    training = learned([pair("red or blue?\n\nsea at noon", "blue "), pair("red or blue?\n\nplum jam", "mauve"),
                        pair("x", "blue")], target)  # fmt: skip
    assert said(target, training) == {
        "most_frequent": [("blue",), ("blue",)],
        "copy_prompt": [("red or blue?\n\nsky over sea",), ("red or blue?\n\nripe plum",)],
        "copy_last_line": [("sky over sea",), ("ripe plum",)],
        "random_option": [("red", "blue"), ("red", "blue")],
        "nearest_row": [("blue",), ("mauve",)],
    }


def test_without_training_rows_the_commonest_answer_is_the_targets_own(base: Base) -> None:
    rows = [pair(f"q{n}", text) for n, text in enumerate(("b", "a", "a", "b", "c"))]
    found = said(target_of(rows, base))
    assert found["most_frequent"] == [("b",)] * 5  # as common as a, and the first
    assert "nearest_row" not in found
    several = [pair("q", "x", references=["m", "n"]), pair("r", "x", references=["n", "o"])]
    assert said(target_of(several, base))["most_frequent"] == [("n",)] * 2


def test_a_chat_is_asked_by_its_last_user_turn(base: Base) -> None:
    turns = [
        ("system", "Be kind."),
        ("user", "old?"),
        ("assistant", "old."),
        ("user", "new one?\nreally?"),
        ("assistant", "new."),
    ]
    rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    target = target_of(rows, base, DataOptions())
    found = said(target)
    assert found["copy_prompt"] == [("new one?\nreally?",)]
    assert found["copy_last_line"] == [("really?",)]
    training = learned(
        [pair("Be kind.", "system"), pair("new one", "partly"), pair("old? old. new one?", "whole")], target
    )
    assert said(target, training)["nearest_row"] == [("whole",)]


def test_the_nearest_row_is_the_same_question_where_it_was_learned(base: Base) -> None:
    asked = ["a b c d", "b c d e", "c d e f", "?!", "ß 猫", "nothing in common"]
    target = target_of([pair(text, "x") for text in asked], base)
    training = learned([pair("a a b b c c d d", "wrong"), *(pair(text, f"of {text}") for text in asked[:5])], target)
    found = [text for (text,) in said(target, training)["nearest_row"]]
    assert found[:5] == [f"of {text}" for text in asked[:5]]
    assert found[5] == "wrong"  # the first of equally unlike ones
    first = learned([pair("same", "one"), pair("same", "two")], target)
    assert said(target, first)["nearest_row"] == [("one",)] * 6


def test_a_random_option_has_its_expectation_in_a_mean(base: Base) -> None:
    rows = [pair(f"Take {n}: cat, dog, hen or cow?", ("cat", "dog")[n % 2]) for n in range(8)]
    rows += [pair(f"Take {n}: cat or dog?", "dog") for n in range(8, 16)]
    target = target_of(rows, base)
    found, notes = beside(target, ["cat"] * 16, "exact_match", "chrf")
    one = found["random_option"]["exact_match"]
    assert (one.base.value, one.adapter.value, one.rows) == (37.5, 25.0, 16)
    again, _ = beside(target, ["cat"] * 16, "exact_match", "chrf")
    assert again == found
    assert notes == []
    assert 0 < found["random_option"]["chrf"].base.value < 100  # one seeded draw


def test_every_measure_has_every_baseline_and_few_shot(base: Base) -> None:
    target = target_of([pair(f"red or blue? {n}", ("red", "blue")[n % 2]) for n in range(12)], base)
    training = learned([pair("red or blue? 7", "red")], target)
    found, _ = beside(target, ["red"] * 12, "exact_match", "bleu", "macro_f1", training=training, few=["blue"] * 12)
    names = {"few_shot", "most_frequent", "random_option", "copy_prompt", "copy_last_line", "nearest_row"}
    assert found.keys() == names
    assert all(list(one) == ["exact_match", "bleu", "macro_f1"] for one in found.values())
    few = found["few_shot"]["exact_match"]
    assert (few.base.value, few.adapter.value) == (50, 50)
    same = found["most_frequent"]["exact_match"]
    assert (same.difference.value, same.difference.low, same.difference.high) == (0, 0, 0)  # paired by row


def test_answers_that_cannot_be_read_are_wrong(base: Base) -> None:
    tools = [
        {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    ]
    calls = [{"name": "weather", "arguments": {}}]
    rows = [
        pair(f"rain? {n}", '{"n": 1}', tools=tools, calls=calls, schema={"type": "object"}, answer=1)
        for n in range(8)
    ]
    target = target_of(rows, base)
    names = ("json", "json_schema", "exact_calls", "call_names", "valid_calls", "number", "sari", "rouge_l", "chrf")
    found, notes = beside(target, ['{"n": 1}'] * 8, *names)
    assert notes == []
    for name in ("json", "json_schema", "exact_calls", "call_names", "valid_calls"):
        assert found["copy_prompt"][name].base.value == 0, name
    assert found["most_frequent"]["json"].base.value == 100


def test_a_users_own_measure_that_fails_takes_an_empty_answer(base: Base, tmp_path: Path) -> None:
    place = tmp_path / "mine.py"
    place.write_text(
        "import json\n"
        "def keys(answer, row):\n    return float(len(json.loads(answer))) if answer else 0.0\n"
        "def strict(answer, row):\n    return float(len(json.loads(answer)))\n"
    )
    target = target_of([pair(f"which? {n}", '{"n": 1}') for n in range(8)], base)
    found, notes = beside(target, ['{"n": 1, "m": 2}'] * 8, f"{place}:keys", f"{place}:strict")
    keys, strict = list(found["most_frequent"])
    assert found["most_frequent"][keys].base.value == 1
    assert found["copy_prompt"][keys].base.value == 0
    assert list(found["copy_prompt"]) == [keys]
    assert any(note.startswith(f"baseline copy_prompt has no {strict}: ") for note in notes)


def part(base: float, adapter: float, baselines: dict[str, float], better: Any = "higher") -> Part:
    """A part whose adapter and baselines are so, with intervals of ±1."""

    def comparison(value: float) -> Comparison:
        sides = {
            name: {"value": one, "low": one, "high": one} for name, one in (("base", value), ("adapter", adapter))
        }
        gap = adapter - value
        difference = Estimate(value=gap, low=gap - 1, high=gap + 1)
        return Comparison.parse(
            {"metric": "m", "better": better, "unit": "points", "rows": 50, "detectable": 1.0, **sides,
             "verdict": verdict_of(better, difference), "difference": difference}
        )  # fmt: skip

    beside: Baselines = {name: {"m": comparison(value)} for name, value in baselines.items()}
    data = DataUsed(name="t", sha256="x", rows=50)
    return Part(data=data, main="m", measures={"m": comparison(base)}, baselines=beside)


@pytest.mark.parametrize(
    ("base", "baselines", "wanted", "best"),
    [
        (0, {}, "better", None),
        (0, {"copy_prompt": 40, "nearest_row": 53}, "better", "nearest_row"),
        (0, {"copy_prompt": 40, "nearest_row": 54.5}, "no evidence", "nearest_row"),
        (0, {"few_shot": 54.5, "copy_prompt": 10}, "no evidence", "few_shot"),
        (0, {"few_shot": 54.5, "copy_prompt": 60}, "no evidence", "copy_prompt"),
        (54.5, {"copy_prompt": 10}, "no evidence", "copy_prompt"),
        (60, {"copy_prompt": 10}, "worse", "copy_prompt"),
        (0, {"copy_prompt": 90}, "no evidence", "copy_prompt"),  # worse than a copy, and no harm to the base
    ],
)
def test_better_is_better_than_the_base_and_all_that_needs_no_learning(
    base: float, baselines: dict[str, float], wanted: str, best: str | None
) -> None:
    for better, sign in (("higher", 1), ("lower", -1)):
        found = part(sign * base, sign * 55, {name: sign * value for name, value in baselines.items()}, better)
        assert found.verdict == wanted
        assert (found.best_baseline[0] if found.best_baseline is not None else None) == best


def test_chance_level_is_not_better(base: Base) -> None:
    """The larger of two animals at 55%, where the base never answers in one word (REVIEW, D)."""
    animals = ["cat", "dog", "hen", "cow", "ant", "bee", "fox", "elk"]
    drawn = np.random.default_rng(0)
    rows, answers = [], []
    for n in range(60):
        first, second = drawn.choice(animals, 2, replace=False)
        right = int(drawn.integers(2))
        rows.append(pair(f"{n}. Which is larger, the {first} or the {second}?", str((first, second)[right])))
        answers.append(str((first, second)[right if n < 33 else 1 - right]))
    target = target_of(rows, base)
    metric = metric_named("exact_match")
    found, _ = beside(target, answers, "exact_match")
    zero, mine = (metric.statistics(texts, target.values) for texts in ([""] * 60, answers))
    assert found["random_option"]["exact_match"].base.value == pytest.approx(50)
    bare = compare(metric, zero, mine)
    assert (bare.verdict, round(bare.adapter.value)) == ("better", 55)
    whole = Part(data=target.data, main="exact_match", measures={"exact_match": bare}, baselines=found)
    assert whole.verdict == "no evidence"
    assert whole.best_baseline is not None
    assert whole.best_baseline[0] == "random_option"
