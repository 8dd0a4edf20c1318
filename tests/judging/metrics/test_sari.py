"""SARI: the values that its reference implementations print for their own examples, and what follows from 0/0 = 1."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from postil.errors import JudgeError
from postil.judging.metrics import metric_named
from postil.judging.metrics.sari import sentence_sari

SOURCE = "About 95 species are currently accepted ."
REFERENCES = [
    "About 95 species are currently known .",
    "About 95 species are now accepted .",
    "95 species are now accepted .",
]
ROW = {"prompt": SOURCE, "references": REFERENCES}


def score(answer: str, row: dict[str, object], **options: object) -> float:
    metric = metric_named("sari", options)
    return float(metric.value(metric.statistics([answer], [row]).sum(axis=0)))


def test_the_documented_example() -> None:
    assert score("About 95 you now get in .", ROW) == pytest.approx(26.953601953601954, abs=1e-12)


def test_a_text_of_several_sentences() -> None:
    # The example of a published fork of that implementation, which gives it 0.6469945583350272.
    fight = "One side of the armed conflict"
    one = (
        f"{fight} is composed mainly of the sudanese military and the janjaweed. The latter are a sudanese militia "
        "group. They are recruited mostly from afro-arab abbala tribes. These tribes are from the northern rizeigat "
        "region in sudan."
    )
    source = (
        f"{fight}s is composed mainly of the Sudanese military and the Janjaweed, a Sudanese militia group recruited "
        "mostly from the Afro-Arab Abbala tribes of the northern Rizeigat region in Sudan."
    )
    others = [
        "There is a side of the armed conflicts. It is composed mainly of the sudanese military and the janjaweed. "
        "It is a sudanese militia group. It is recruited mostly from the afro-arab abbala tribes. They are from the "
        "northern rizeigat region in sudan.",
        f"{fight}s is composed mainly of the sudanese military and the janjaweed. The latter is a sudanese militia "
        "group. It is recruited mostly from the afro-arab abbala tribes of the northern rizeigat region in sudan.",
        f"{fight}s is composed mainly of the sudanese military and the janjaweed, a sudanese militia group. The "
        "janjaweed are recruited mostly from the afro-arab abbala tribes of the northern rizeigat region in sudan.",
    ]
    row = {"prompt": one, "references": [one, *others]}
    assert score(source, row) == pytest.approx(64.69945583350272, abs=1e-9)


words = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=7, unique=True)


@given(words, words)
def test_the_one_reference_itself_is_whole(source: list[str], reference: list[str]) -> None:
    assert sentence_sari(source, reference, [reference]) == pytest.approx(1)


def test_copying_is_punished_where_the_reference_changes() -> None:
    reference = [{"prompt": "the cat perished", "completion": "the cat died"}]
    assert score("the cat died", reference[0]) == 100
    # kept 1-grams: precision 2/3, recall 1; 2-grams 1/2 and 1; longer ones 0. Nothing deleted counts 1, nothing added
    # has precision 1 and recall 0, but the 4-grams, of which there are none anywhere, count 1.
    kept = [2 * (2 / 3) / (2 / 3 + 1), 2 * (1 / 2) / (1 / 2 + 1), 0, 1]
    assert score("the cat perished", reference[0]) == pytest.approx(100 * (sum(kept) + 4 + 1) / 12)


def test_where_the_source_stands() -> None:
    chat = {"messages": [{"role": "user", "content": SOURCE}, {"role": "assistant", "content": REFERENCES[0]}]}
    plain = {"prompt": SOURCE, "completion": REFERENCES[0]}
    asked = {"prompt": f"Make it simple: {SOURCE}", "completion": REFERENCES[0], "text_in": SOURCE}
    answer = "About 95 are known ."
    assert score(answer, chat) == score(answer, plain) == score(answer, asked, source="text_in")
    assert score(answer, asked) != score(answer, plain)
    with pytest.raises(JudgeError, match=r"row 1: no column 'text_on' \(did you mean 'text_in'"):
        score(answer, asked, source="text_on")


def test_each_reference_votes_equal_ones_too() -> None:
    known, now = "About 95 species are currently known .", "95 species are now accepted ."
    twice = score("About 95 you now get in .", {"prompt": SOURCE, "references": [known, known, now]})
    once = score("About 95 you now get in .", {"prompt": SOURCE, "references": [known, now]})
    assert (round(twice, 2), round(once, 2)) == (25.70, 26.20)


def test_an_instruction_is_no_part_of_the_source_or_it_is_said() -> None:
    alpaca = {"instruction": "Make it simple:", "input": SOURCE, "output": REFERENCES[0]}
    plain = {"prompt": SOURCE, "completion": REFERENCES[0]}
    answer = "About 95 are known ."
    assert score(answer, alpaca) == score(answer, plain)
    assert metric_named("sari").look([alpaca]) == []
    (note,) = metric_named("sari").look([alpaca, plain])
    assert note.startswith("sari: the source is the whole prompt")
    assert "metric_options.sari.source" in note
    assert metric_named("sari", {"source": "prompt"}).look([plain]) == []
    alone = {"instruction": SOURCE, "input": " ", "output": REFERENCES[0]}  # nothing but the instruction
    assert len(metric_named("sari").look([alone])) == 1
    assert score(answer, alone) == score(answer, plain)
