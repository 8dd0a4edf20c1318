"""What a sample asks: the same for rows of one prompt, none for running text; and the split that goes by it."""

from __future__ import annotations

from typing import Any

import pytest

from postil.data import DataOptions, load_data, split_valid


def rows(count: int) -> list[dict[str, Any]]:
    """E2E's kind: every prompt has several completions."""
    return [{"prompt": f"name[{n // 4}]", "completion": f"text {n}"} for n in range(count)]


@pytest.mark.parametrize("fmt", ["raw", "prompt"])
def test_equal_prompts_land_on_one_side(chatml: Any, fmt: Any) -> None:
    data = load_data(rows(80), chatml, DataOptions(format=fmt))
    assert len({sample.question for sample in data.samples}) == 20
    train, valid = split_valid(data.samples, 0.1, 0)
    assert len(valid) == 8
    prompts = [{(sample.row - 1) // 4 for sample in part} for part in (train, valid)]
    assert prompts[0].isdisjoint(prompts[1])


def test_a_conversation_asks_all_that_stands_before_its_last_answer(chatml: Any) -> None:
    def chat(*turns: str) -> dict[str, Any]:
        roles = ("user", "assistant")
        return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]}

    given = [
        chat("a", "b"),
        chat("a", "c"),
        chat("a", "b", "d", "e"),
        chat("a", "c", "d", "e"),
        chat("a", "b", "d", "f"),
    ]
    asked = [sample.question for sample in load_data(given, chatml).samples]
    assert asked[0] == asked[1]
    assert asked[2] == asked[4]
    assert len(set(asked)) == 3


def test_running_text_asks_nothing_and_equal_texts_stay_together(chatml: Any) -> None:
    data = load_data([{"text": f"text {n // 2}"} for n in range(40)], chatml)
    assert {sample.question for sample in data.samples} == {b""}
    train, valid = split_valid(data.samples, 0.1, 0)
    assert len(valid) == 4
    assert {one.ids.tobytes() for one in train}.isdisjoint(one.ids.tobytes() for one in valid)


def test_rows_without_a_prompt_are_split_by_row(chatml: Any) -> None:
    data = load_data(
        [{"prompt": "", "completion": f"text {n}"} for n in range(40)], chatml, DataOptions(format="raw")
    )
    train, valid = split_valid(data.samples, 0.1, 0)
    assert (len(train), len(valid)) == (36, 4)
