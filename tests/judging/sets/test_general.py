"""General ability: text, choices and pairs read, scored as by hand, and made parts of a card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from postil.adapter import AdaptedModel
from postil.base import Base
from postil.data import DataOptions
from postil.data.shipped import SHIPPED
from postil.errors import DataError, JudgeError
from postil.judging.asking.likelihoods import nats_and_kl, row_losses
from postil.judging.card.build import Draw
from postil.judging.options import GeneralOptions
from postil.judging.sets.general import General, general_parts, measure, read_general
from postil.judging.sets.target import read_target

Hand = Callable[..., torch.Tensor]
TEXT = [{"text": f"Line {n} of some text that nobody has learned."} for n in range(8)]
CHOICES = [
    {"context": f"What is {n}?", "choices": ["one", "two of them", "3"], "answer": n % 3, "subject": "ab"[n % 2]}
    for n in range(12)
]
WORDS = ("do", "can", "may", "will", "must", "never", "often", "now", "here", "so", "still", "too")
PAIRS = [
    {"good": f"Cats {word} sleep.", "bad": f"Cats sleep {word}.", "paradigm": "xyz"[n % 3], "field": "syntax"}
    for n, word in enumerate(
        ["do", "can", "may", "will", "must", "never", "often", "now", "here", "so", "still", "too"]
    )
]
OPTIONS = GeneralOptions(window=32)
HALF = "half \ud800"


@pytest.fixture
def general(base: Base) -> General:
    return read_general(TEXT, CHOICES, PAIRS, base, OPTIONS, 0)


def test_text_has_its_nats_and_its_kl(model: AdaptedModel, general: General) -> None:
    told: list[int] = []
    found = measure(general, model, "note", done=told.append).parts
    assert found["nats"]["nats"].tolist() == [list(one) for one in row_losses(model, general.windows, "note")]
    assert found["kl"]["kl"].tolist() == [list(one) for one in nats_and_kl(model, general.windows, "note")[1]]
    assert sum(told) == general.work
    assert general.text is not None
    assert general.text.tokens == found["nats"]["nats"][:, 1].sum() == found["kl"]["kl"][:, 1].sum()


def test_the_base_has_no_kl_to_itself_and_its_work_is_counted(model: AdaptedModel, general: General) -> None:
    told: list[int] = []
    found = measure(general, model, None, done=told.append).parts
    assert found["kl"]["kl"][:, 0].tolist() == [0.0] * len(general.windows)
    assert found["kl"]["kl"][:, 1].tolist() == found["nats"]["nats"][:, 1].tolist()
    assert sum(told) == general.work


def test_parts_compare_base_and_adapter(model: AdaptedModel, general: General) -> None:
    bare, mine = measure(general, model, None), measure(general, model, "note")
    parts = general_parts(general, bare, mine, Draw(), ["paradigm", "subject"], 4)
    assert {name: part.main for name, part in parts.items()} == {
        "nats": "nats", "kl": "kl", "choices": "accuracy", "pairs": "accuracy"
    }  # fmt: skip
    nats = parts["nats"].measures["nats"]
    sums = bare.parts["nats"]["nats"].sum(0)
    assert nats.base.value == pytest.approx(sums[0] / sums[1])
    assert (nats.better, nats.unit, nats.rows) == ("lower", "nats/token", len(general.windows))
    assert parts["kl"].measures["kl"].verdict == "worse"
    assert list(parts["pairs"].slices) == ["paradigm"]
    assert {value: found["accuracy"].rows for value, found in parts["pairs"].slices["paradigm"].items()} == {
        "x": 4, "y": 4, "z": 4
    }  # fmt: skip
    assert list(parts["choices"].slices) == ["subject"]
    assert parts["nats"].slices == {}
    one = parts["pairs"].slices["paradigm"]["x"]["accuracy"]
    assert one.level == 0.95  # for harm; a gain is claimed by the interval corrected for three looks
    assert one.corrected is not None
    assert parts["choices"].data.rows == 12
    assert list(parts["choices"].measures) == [
        "accuracy", "accuracy_per_token", "accuracy_per_character", "accuracy_per_byte"
    ]  # fmt: skip
    assert "choices: chance is 33.3%" in general.notes


def test_what_is_used_can_be_bounded(base: Base) -> None:
    some = read_general(TEXT, CHOICES, PAIRS, base, GeneralOptions(window=16, tokens=64, choices=5, pairs_each=2), 0)
    assert [len(window.ids) for window in some.windows] == [16] * 4
    assert len(some.sets["choices"].rows) == 5
    kept = [row.value["paradigm"] for row in some.sets["pairs"].rows]
    assert sorted(kept) == ["x", "x", "y", "y", "z", "z"]
    fewer = read_general(TEXT, None, PAIRS, base, GeneralOptions(pairs=5, kl=False), 0)
    assert len(fewer.sets["pairs"].rows) == 5
    assert fewer.work == len(fewer.windows) + 10


def test_blimps_own_names_and_the_shipped_text(base: Base) -> None:
    rows = [{"sentence_good": row["good"], "sentence_bad": row["bad"]} for row in PAIRS]
    found = read_general(SHIPPED, None, rows, base, GeneralOptions(tokens=1000), 0)
    same = read_general(None, None, PAIRS, base, OPTIONS, 0)
    assert [one[0].ids.tolist() for one in found.sets["pairs"].samples] == [
        one[0].ids.tolist() for one in same.sets["pairs"].samples
    ]
    assert found.text is not None
    assert found.text.name == "postil's general sample"
    assert [len(window.ids) for window in found.windows] == [256] * 3 + [232]  # the base's context is the bound


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("text", {"txt": "a"}, r"general.jsonl:1: no column 'text' \(did you mean 'txt'\?\)"),
        ("text", {"text": 3}, "general.jsonl:1: `text` must be a string, found int"),
        ("text", {"text": "a"}, "gives no window of two tokens"),
        (
            "choices",
            {"context": "a", "choice": ["b", "c"], "answer": 0},
            r"no column 'choices' \(did you mean 'choice'",
        ),
        ("choices", {"context": "a", "choices": ["b"], "answer": 0}, "`choices` must be a list of two strings"),
        ("choices", {"context": "a", "choices": ["b", 3], "answer": 0}, "`choices` must be a list of two strings"),
        ("choices", {"context": "a", "choices": ["b", ""], "answer": 0}, "every question has an empty choice"),
        ("choices", {"context": "a", "choices": ["b", "c"], "answer": 2}, "right place, 0 to 1, found 2"),
        ("choices", {"context": 1, "choices": ["b", "c"], "answer": 1}, "`context` must be a string"),
        ("pairs", {"good": "a", "badd": "b"}, r"no column 'bad' \(did you mean 'badd'\?\)"),
        ("pairs", {"good": "a", "bad": 3}, "`good` and `bad` must be two sentences, as strings"),
        ("pairs", {"good": "a" * 300, "bad": "b"}, "no question fits the base's context of 256 tokens"),
    ],
)
def test_a_slip_names_file_line_and_column(
    base: Base, tmp_path: Path, kind: str, row: dict[str, Any], said: str
) -> None:
    path = tmp_path / "general.jsonl"
    path.write_text(json.dumps(row))
    sources = {"text": None, "choices": None, "pairs": None, kind: path}
    with pytest.raises(DataError, match=said):
        read_general(*sources.values(), base, OPTIONS, 0)  # type: ignore[misc]


def test_pairs_each_needs_paradigms(base: Base) -> None:
    with pytest.raises(DataError, match="have no column 'paradigm', which pairs_each counts by"):
        read_general(None, None, [{"good": "a b", "bad": "b a"}], base, GeneralOptions(pairs_each=2), 0)


def test_questions_left_out_are_said(base: Base) -> None:
    rows = [*PAIRS, {"good": "a" * 300, "bad": "b"}, {"good": "same", "bad": "same"}]
    found = read_general(None, None, rows, base, OPTIONS, 0)
    assert len(found.sets["pairs"].rows) == 12
    assert any("1 pairs are left out, both sentences being equal (rows 14)" in note for note in found.notes)
    assert any("1 questions are left out, too long or too short (rows 13)" in note for note in found.notes)
    empty = {"context": "What is this?", "choices": ["one", "", "3"], "answer": 0, "subject": "a"}
    found = read_general(None, [CHOICES[0], empty, *CHOICES[1:]], None, base, OPTIONS, 0)
    assert [row.value for row in found.sets["choices"].rows] == CHOICES
    assert any("1 questions are left out, a choice being empty (rows 2)" in note for note in found.notes)


def test_a_prompt_without_a_place_for_the_context() -> None:
    with pytest.raises(JudgeError, match=r"general: prompt: must hold \{context\} once"):
        GeneralOptions(prompt="Question:")


def test_another_cut_of_the_same_text_is_other_data(base: Base) -> None:
    text = [{"text": "once upon a time there was a book with wide margins and many notes " * 8}]

    def digest(**settings: Any) -> str:
        options = GeneralOptions(**{"window": 16, "tokens": 64} | settings)
        found = read_general(text, None, None, base, options, 0).text
        assert found is not None
        return found.sha256

    assert digest() == digest()
    assert len({digest(), digest(window=32), digest(tokens=48)}) == 3


@pytest.mark.parametrize(
    ("sets", "row"),
    [
        ({"text": [{"text": "right"}, {"text": HALF}]}, 2),
        ({"choices": [{"context": HALF, "choices": ["a", "b"], "answer": 0}]}, 1),
        ({"choices": [{"context": "a", "choices": ["a", HALF], "answer": 0}]}, 1),
        ({"pairs": [{"good": "a", "bad": HALF}]}, 1),
    ],
)
def test_half_a_surrogate_pair_is_named_by_its_row(base: Base, sets: dict[str, Any], row: int) -> None:
    given = {"text": None, "choices": None, "pairs": None} | sets
    with pytest.raises(DataError, match=rf"the given rows, row {row}: the text holds half a surrogate pair"):
        read_general(**given, base=base, options=GeneralOptions(), seed=0)


def test_a_reference_that_is_no_text_is_named_by_its_row(base: Base) -> None:
    rows = [{"prompt": "q", "references": ["right", HALF]}]
    with pytest.raises(DataError, match="the given rows, row 1: the text holds half a surrogate pair"):
        read_target(rows, base, DataOptions(format="raw"))
