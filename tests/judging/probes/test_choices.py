"""The options that rows offer: in a column, as marked lines, as lists in words, as labels; and what is no option."""

from __future__ import annotations

from typing import Any

import pytest

from postil.judging.probes.choices import own_options


def options(prompt: str, answer: str, **more: Any) -> tuple[str, ...] | None:
    """The options of one row."""
    found = own_options([({"references": [answer]} | more, prompt)], [answer])
    return None if found is None else found[0]


@pytest.mark.parametrize(
    ("prompt", "answer", "wanted"),
    [
        ("Write the animal in it.\n\nowl, drum, tea pot, cup", "drum", ("owl", "drum", "tea pot", "cup")),
        ("Answer yes or no.\n\nIs it red?", "yes", ("yes", "no")),
        ("Answer yes or no.\n\nIs it red?", "No.", ("Answer yes", "No.")),
        ("Price: cheap, moderate, less than £20, or more than £30.\n\nA dear, good place.", "less than £20",
         ("cheap", "moderate", "less than £20", "more than £30")),
        ("Which is it: black and white, red or blue?", "black and white", ("black and white", "red", "blue")),
        ("pos/neg: nice", "neg", ("pos", "neg")),
        ("Options: `a1`; \"b2\"; (c3)", "b2", ("a1", "b2", "c3")),
        ("Q?\nA. copper\nB. tin\n(C) zinc\nAnswer:", "B", ("A", "B", "C")),
        ("Q?\nA) copper\nB) tin", "tin", ("copper", "tin")),
        ("Q?\n1. copper\n2. tin", "2. tin", ("1. copper", "2. tin")),
        ("Where is Rome?", "Italy", None),
        ("In 1912, the ship sank.", "1913", None),
    ],
)  # fmt: skip
def test_a_list_in_the_prompt(prompt: str, answer: str, wanted: tuple[str, ...] | None) -> None:
    assert options(prompt, answer) == wanted


@pytest.mark.parametrize(
    ("more", "answer", "wanted"),
    [
        ({"choices": ["copper", "tin"]}, "tin", ("copper", "tin")),
        ({"options": ["copper", "tin"]}, "B", ("A", "B")),
        ({"options": ["copper", "tin"]}, "1", ("0", "1")),
        ({"options": ["copper", "tin"]}, "2", ("1", "2")),
        ({"choices": {"text": ["copper", "tin"], "label": ["X", "Y"]}}, "Y", ("X", "Y")),
        ({"labels": [1, 2, 3]}, "3", ("1", "2", "3")),
        ({"labels": ["tin"]}, "tin", None),  # what is wanted, not what is offered
        ({"labels": ["tin", "zinc"], "references": ["tin", "zinc"]}, "tin", None),
        ({"choices": ["copper", {"a": 1}]}, "copper", None),
        ({"choices": "copper, tin"}, "tin", None),
    ],
)
def test_a_column_of_the_row(more: dict[str, Any], answer: str, wanted: tuple[str, ...] | None) -> None:
    assert options("Which?", answer, **more) == wanted


def test_what_leads_to_every_list_is_no_option() -> None:
    pairs = [("cat", "dog"), ("ant", "cow"), ("hen", "cat"), ("dog", "ant"), ("cow", "hen")]
    rows = [({"references": [first]}, f"Which is larger, the {first} or the {second}?") for first, second in pairs]
    assert own_options(rows, []) == [(first, f"the {second}") for first, second in pairs]


def test_nine_rows_in_ten_must_list_their_answer() -> None:
    listing = [({"references": ["red"]}, "red or blue?")] * 9
    other = ({"references": ["green"]}, "What colour?")
    assert own_options([*listing, other], ["x", "y"]) == [("red", "blue")] * 9 + [("",)]
    assert own_options([*listing, other, other], ["x", "y"]) is None


def test_labels_are_options_where_they_are_few() -> None:
    rows = [({"references": [name]}, "Say.") for name in ("up", "down", "up")]
    assert (
        own_options(rows, ["up", "down", "up", "left", "up", "up", "down", "up", "up"])
        == [("up", "down", "left")] * 3
    )
    assert own_options(rows, ["up", "down", "left"]) is None
    assert own_options(rows, ["up"] * 9) is None
    assert own_options(rows, ["a long\nanswer", "another"] * 9) is None
