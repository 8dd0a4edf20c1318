"""The target's rows as items: references grouped, prompts as training had them, examples, stops, and slips."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from postil.base import Base
from postil.data import DataOptions, load_data
from postil.errors import DataError, JudgeError
from postil.judging.sets.examples import Training, read_training
from postil.judging.sets.target import Target, check_answers, default_stop, few_shot, read_target

RAW = DataOptions(format="raw")
PAIRS = [
    {"prompt": "one", "completion": "eins", "topic": "a"},
    {"prompt": "two", "completion": "zwei", "topic": "b"},
    {"prompt": "one", "completion": "uno", "topic": "c"},
]


def training(rows: list[dict[str, Any]], target: Target) -> Training:
    found, note = read_training(rows, target.options, target.format, asked_for=True)
    assert found is not None
    assert note == ""
    return found


def prompts(target: Target, base: Base) -> list[str]:
    return [base.tokenizer.decode(list(item.ids)) for item in target.items]


def test_rows_with_an_equal_prompt_are_one_question(base: Base) -> None:
    target = read_target(PAIRS, base, RAW)
    assert [item.rows for item in target.items] == [(1, 3), (2,)]
    assert [item.value["references"] for item in target.items] == [["eins", "uno"], ["zwei"]]
    assert target.items[0].value["topic"] == "a"
    assert prompts(target, base) == ["one\n", "two\n"]
    assert "3 rows ask 2 questions" in target.notes[0]
    assert (target.data.rows, target.data.name) == (3, "the given rows")
    learned = load_data(PAIRS, base, RAW).samples
    found = [target.samples[place] for item in target.items for place in item.samples]
    assert [sample.row for sample in found] == [1, 3, 2]
    for sample in found:
        (same,) = [other for other in learned if other.row == sample.row]
        assert sample.ids.tolist() == same.ids.tolist()
        assert sample.weights.tolist() == same.weights.tolist()
    assert target.data.tokens == sum(sample.target_tokens for sample in learned)


def test_weights_of_turns_ask_no_other_question(base: Base) -> None:
    def row(answer: str, **more: Any) -> dict[str, Any]:
        turns = [("user", "one"), ("assistant", "1"), ("user", "two"), ("assistant", answer)]
        messages = [{"role": role, "content": text} for role, text in turns]
        messages[1] |= more
        return {"messages": messages}

    target = read_target([row("zwei"), row("dos", weight=0), row("deux", weight=0.5)], base, DataOptions())
    assert [item.rows for item in target.items] == [(1, 2, 3)]


def test_equal_references_are_kept_for_each_votes(base: Base) -> None:
    from postil.judging.metrics import default_metric, metric_named

    source = "About 95 species are currently accepted ."
    known = "About 95 species are currently known ."
    texts = [known, known, "95 species are now accepted ."]
    at_once = read_target([{"prompt": source, "references": texts}], base, RAW)
    one_a_row = read_target([{"prompt": source, "completion": text} for text in texts], base, RAW)
    metric = metric_named("sari")
    for target in (at_once, one_a_row):
        assert target.values[0]["references"] == texts
        said = metric.statistics(["About 95 you now get in ."], target.values)
        assert round(said[0, 0], 2) == 25.70  # 26.20 where the second vote is left out
    twice = [{"prompt": f"q{n}", "completion": "a long answer of words"} for n in (0, 0, 1)]
    assert default_metric(read_target(twice, base, RAW).values)[1] == "the answers are free text"


def test_a_column_that_no_row_has_is_named(base: Base) -> None:
    rows = [{"q": "one", "a": "eins"}]
    columns = {"prompt": "q", "completion": "a", "system": "sys"}
    with pytest.raises(DataError, match="columns: no row has anything in 'sys', which stands for 'system'"):
        read_target(rows, base, DataOptions(format="raw", columns=columns))


def test_rows_asked_once_are_not_talked_about(base: Base) -> None:
    assert read_target(PAIRS[:2], base, RAW).notes == ()


def test_the_references_a_row_brings(base: Base) -> None:
    rows = [
        {"prompt": "one", "references": ["eins", "uno"]},
        {"prompt": "two", "completion": "zwei", "accept": ["zwei", "zwo"]},
    ]
    found = read_target(rows, base, RAW)
    assert [item.value["references"] for item in found.items] == [["eins", "uno"], ["zwei", "zwo"]]
    assert found.samples[0].target_tokens == len("eins") + 1  # the first reference is what is scored
    (item,) = read_target([{"prompt": "one", "references": ["", "eins"]}], base, RAW).items
    assert item.value["references"] == ["", "eins"]  # an empty one counts, and the first that is not is scored
    assert item.value["completion"] == "eins"


@pytest.mark.parametrize("fmt", ["chat", "prompt"])
def test_a_conversation_is_asked_up_to_its_last_answer(base: Base, fmt: str) -> None:
    if fmt == "prompt":
        rows: list[dict[str, Any]] = [{"prompt": "one", "completion": "eins", "system": "German."}]
    else:
        turns = (("system", "German."), ("user", "one"), ("assistant", "eins"))
        rows = [{"messages": [{"role": role, "content": text} for role, text in turns]}]
    target = read_target(rows, base, DataOptions())
    asked = "<|im_start|>system\nGerman.<|im_end|>\n<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
    assert (target.format, prompts(target, base)) == (fmt, [asked])
    assert target.items[0].value["references"] == ["eins"]
    assert target.stop == ()
    whole = base.tokenizer.decode(target.samples[0].ids)
    assert whole.startswith(asked + "eins<|im_end|>")


def test_running_text_has_losses_and_no_questions(base: Base) -> None:
    long = "word " * 100  # 500 tokens in a context of 256
    target = read_target([{"text": long}, {"text": "short"}], base, DataOptions())
    assert (target.format, target.answers) == ("text", False)
    assert [len(item.samples) for item in target.items] == [2, 1]
    assert target.data.tokens == len(long) + len("short") + 2 - 2  # ends of sequence, less the first tokens
    with pytest.raises(JudgeError, match="holds running text, which has no answers for bleu; leave --metrics out"):
        check_answers(target, ["bleu"])


def test_a_limit_takes_questions_by_chance_from_the_seed(base: Base) -> None:
    rows = [{"prompt": f"q{n}", "completion": "a"} for n in range(20)]
    picks = [
        tuple(item.rows[0] for item in read_target(rows, base, RAW, limit=5, seed=seed).items) for seed in (0, 0, 1)
    ]
    assert picks[0] == picks[1] != picks[2]
    assert all(len(pick) == 5 and list(pick) == sorted(pick) for pick in picks)
    digests = {read_target(rows, base, RAW, limit=5, seed=seed).data.sha256 for seed in (0, 0, 1)}
    assert len(digests) == 2


def test_what_an_answer_may_be(base: Base) -> None:
    target = read_target([{"prompt": "one", "completion": "x" * 40}], base, RAW)
    assert (target.max_new_tokens, target.stop) == (58, ("\n",))  # 1.25 · 40 + 8
    given = read_target(PAIRS, base, RAW, max_new_tokens=3, stop=("!",))
    request = given.request("note", given.items[0].ids, base.context)
    assert (request.adapter, request.max_new_tokens, request.stop) == ("note", 3, ("!",))
    assert given.request(None, [0] * 255, 256).max_new_tokens == 1


@pytest.mark.parametrize(
    ("fmt", "references", "stop"),
    [
        ("raw", ["a", "b\n"], ("\n",)),
        ("raw", ["a\nb"], ("\n\n",)),
        ("raw", ["a\n\nb"], ()),
        ("chat", ["a"], ()),
    ],
)
def test_where_a_raw_answer_stops(fmt: str, references: list[str], stop: tuple[str, ...]) -> None:
    assert default_stop(fmt, references) == stop


def test_a_question_too_long_for_the_base_is_left_out_and_said(base: Base) -> None:
    rows = [{"prompt": "x" * 300, "completion": "a"}, {"prompt": "one", "completion": "b"}]
    target = read_target(rows, base, RAW)
    assert [item.rows for item in target.items] == [(2,)]
    assert "1 questions are left out: too long for the base's context of 256 tokens" in target.notes
    assert target.data.rows == 1
    with pytest.raises(DataError, match="no row fits the base's context of 256 tokens"):
        read_target(rows[:1], base, RAW)


def test_examples_are_text_before_a_raw_prompt(base: Base) -> None:
    target = read_target(PAIRS, base, RAW)
    train = [{"prompt": f"t{n}", "completion": f"c{n}"} for n in range(9)] + [{"prompt": "one", "completion": "no"}]
    found = few_shot(target, training(train, target), base, 2, seed=0)
    texts = [base.tokenizer.decode(ids) for ids in found.ids]
    heads = {text.removesuffix(own) for text, own in zip(texts, ("one\n", "two\n"), strict=True)}
    (head,) = heads  # one draw for all, and not the row that the target asks itself
    blocks = head.split("\n\n")
    assert blocks.pop() == ""
    assert len(blocks) == 2
    assert all(block[:3] == f"t{block[1]}\n" and block[3:] == f"c{block[1]}" for block in blocks)
    assert (found.shots, found.notes) == (2, ())
    assert few_shot(target, training(train, target), base, 2, seed=0) == found
    assert few_shot(target, training(train, target), base, 2, seed=3).ids != found.ids


def test_examples_are_turns_of_a_conversation(base: Base) -> None:
    rows = [{"prompt": "one", "completion": "eins", "system": "German."}]
    target = read_target(rows, base, DataOptions())
    train = [{"prompt": "two", "completion": "zwei", "system": "Other."}]
    (ids,) = few_shot(target, training(train, target), base, 1, seed=0).ids
    turns = (("system", "German."), ("user", "two"), ("assistant", "zwei"), ("user", "one"))
    wanted = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    assert base.tokenizer.decode(ids) == wanted + "<|im_start|>assistant\n"


def test_a_prompt_has_as_many_examples_as_fit(base: Base) -> None:
    target = read_target([{"prompt": "q" * 150, "completion": "a"}, {"prompt": "q", "completion": "a"}], base, RAW)
    train = [{"prompt": "t" * 30, "completion": "c"} for _ in range(3)]
    found = few_shot(target, training(train, target), base, 3, seed=0)
    texts = [base.tokenizer.decode(ids) for ids in found.ids]
    assert [text.count("\nc\n\n") for text in texts] == [2, 3]
    assert found.notes == ("few-shot: 1 prompts have fewer than 3 examples, for the base's context",)


def test_too_few_rows_to_draw_from(base: Base) -> None:
    target = read_target(PAIRS, base, RAW)
    with pytest.raises(JudgeError, match=r"has 0 rows that the target does not ask itself; --shots 1 needs as many"):
        few_shot(target, training(PAIRS, target), base, 1, seed=0)


def test_where_nobody_says_how_many_there_are_four_or_all_there_are(base: Base) -> None:
    target = read_target(PAIRS, base, RAW)
    for count, shots in ((9, 4), (4, 4), (3, 3), (0, 0)):
        rows = [{"prompt": f"t{n}", "completion": "c"} for n in range(count)] + PAIRS
        found = few_shot(target, training(rows, target), base, None, seed=0)
        assert found.shots == shots
        assert len(found.ids) == (len(target.items) if shots else 0)  # nothing is asked again without examples
        assert bool(found.notes) is (not shots)
        assert all(base.tokenizer.decode(ids).count("\nc\n\n") == shots for ids in found.ids)


def test_a_packed_file_with_renamed_columns(base: Base, tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"question": "one", "reply": "eins"}).encode()))
    options = DataOptions(format="raw", columns={"prompt": "question", "completion": "reply"})
    target = read_target(path, base, options)
    assert prompts(target, base) == ["one\n"]
    assert target.items[0].value["references"] == ["eins"]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("", "is empty: it has no row"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": ', "test.jsonl:2: not JSON"),
        ('{"promt": "a", "completion": "b"}', r"test.jsonl:1: .*did you mean 'prompt'\?"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}', "test.jsonl:2: no column 'completion'"),
        ('{"prompt": "a", "references": [""]}', "test.jsonl:1: `references` holds empty texts alone"),
        ('{"prompt": "a", "references": []}', "test.jsonl:1: `references` must be a list of at least one string"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
            "test.jsonl:1: the last message must be the assistant's",
        ),
    ],
)
def test_a_slip_names_its_line(base: Base, tmp_path: Path, lines: str, said: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text(lines)
    with pytest.raises(DataError, match=said):
        read_target(path, base, DataOptions())


def test_examples_of_another_kind(base: Base) -> None:
    target = read_target(PAIRS, base, DataOptions())
    with pytest.raises(JudgeError, match="rows of format text, which are no examples for a target of format prompt"):
        training([{"text": "once upon a time"}] * 4, target)


def test_what_the_target_asks_is_not_drawn_from_chats_either(base: Base) -> None:
    target = read_target(PAIRS, base, DataOptions())
    turns = (("user", "prompt"), ("assistant", "completion"))
    chats = [{"messages": [{"role": role, "content": row[key]} for role, key in turns]} for row in PAIRS]
    with pytest.raises(JudgeError, match="has 0 rows that the target does not ask itself"):
        few_shot(target, training(chats, target), base, 1, seed=0)
