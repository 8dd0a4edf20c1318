"""postil generate and chat: one prompt, a file of requests in one batch, a conversation, and each wrong input."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def generate(base: Path) -> tuple[Any, ...]:
    return ("generate", "--base", base, "-n", 6)


@pytest.fixture
def ask(tmp_path: Path) -> Any:
    """ask(line, ...): a file of requests."""

    def write(*lines: Any) -> Path:
        path = tmp_path / "ask.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


def answers(result: Any) -> list[dict[str, Any]]:
    assert result.code == 0, result
    return [json.loads(line) for line in result.out.splitlines()]


def test_a_prompt_is_answered_with_and_without_a_note(
    postil: Any, generate: Any, adapter: Path, changed: Any
) -> None:
    def strong(tensors: dict[str, Any]) -> None:
        for key, value in tensors.items():
            if ".lora_B" in key:
                value.mul_(500)

    note = changed(adapter, "adapter_model.safetensors", strong)
    bare = postil(*generate, "Hello")
    noted = postil(*generate, "Hello", "--adapter", note)
    assert (bare.code, noted.code) == (0, 0)
    assert bare.out.endswith("\n")
    assert bare.out != noted.out
    assert postil(*generate, "Hello").out == bare.out


def test_a_note_that_learned_plain_text_is_asked_so(
    postil: Any, base: Path, rows: Path, generate: Any, ask: Any, tmp_path: Path
) -> None:
    run = tmp_path / "plain"
    settings = ("rows.format=raw", 'rows.separator=" => "', "training.steps=1")
    words = [word for setting in settings for word in ("--set", setting)]
    assert postil("train", "--base", base, "--data", rows, "--out", run, *words).code == 0
    note = ("--adapter", run / "adapter")
    asked, given, short = (postil(*generate, *words, *note) for words in (
        ["Say 3"], ["Say 3 => ", "--raw"], ["Say 3", "--raw"],
    ))  # fmt: skip
    assert asked.out == given.out
    assert "plain learned plain text, ' => ' between prompt and completion: so it is asked" in asked.err
    assert "learned plain text" not in given.err
    assert "leave --raw out, and it is put there" in short.err
    (one,) = answers(postil(*generate, *note, "--requests", ask({"prompt": "Say 3", "adapter": "plain"})))
    assert one["text"] == asked.out.removesuffix("\n")


def test_sampling_is_decided_by_its_seed(postil: Any, generate: Any) -> None:
    outs = [postil(*generate, "Hello", "--temperature", 2, "--seed", seed).out for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]


def test_a_file_of_requests_is_one_batch(postil: Any, generate: Any, adapter: Path, ask: Any) -> None:
    lines = [
        {"prompt": "a", "adapter": "one"},
        {"prompt": "a"},
        {"prompt": "b", "adapter": "run", "max_new_tokens": 2},
        {"messages": [{"role": "user", "content": "a"}]},
        {"prompt": "a", "raw": True},
    ]
    words = ("--adapter", f"one={adapter}", "--adapter", adapter, "--requests", ask(*lines))
    found = answers(postil(*generate, *words))
    assert [answer["adapter"] for answer in found] == ["one", None, "run", None, None]
    assert [answer["new_tokens"] for answer in found] == [6, 6, 2, 6, 6]
    assert [answer["prompt_tokens"] for answer in found] == [20, 20, 20, 20, 1]
    assert found[1]["text"] == found[3]["text"]
    assert found[1]["finish_reason"] == "length"


def test_the_options_stand_in_for_what_a_line_leaves_out(postil: Any, generate: Any, ask: Any) -> None:
    file = ask({"prompt": "a"}, {"prompt": "a", "max_new_tokens": 1, "raw": False, "temperature": 0})
    (first, second) = answers(postil(*generate, "--raw", "--temperature", 3, "--seed", 4, "--requests", file))
    assert (first["prompt_tokens"], first["new_tokens"]) == (1, 6)
    assert (second["prompt_tokens"], second["new_tokens"]) == (20, 1)
    (seeded,) = answers(
        postil(*generate, "--raw", "--temperature", 3, "--seed", 5, "--requests", ask({"prompt": "a"}))
    )
    assert seeded["text"] != first["text"]


def test_chat_keeps_the_conversation(
    postil: Any, base: Path, generate: Any, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "one"}]
    (first,) = answers(postil(*generate, "--requests", ask({"messages": messages})))
    messages += [{"role": "assistant", "content": first["text"]}, {"role": "user", "content": "two"}]
    (second,) = answers(postil(*generate, "--requests", ask({"messages": messages})))
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n\nthree\n"))  # an empty line ends
    result = postil("chat", "--base", base, "-n", 6, "--system", "Be kind.")
    assert (result.code, result.out) == (0, f"{first['text']}\n{second['text']}\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))  # so does Ctrl-D
    assert postil("chat", "--base", base, "-n", 6, "--system", "Be kind.").out == result.out


def overflowing(tensors: dict[str, Any]) -> None:
    """Finite numbers whose products are not."""
    for key, value in tensors.items():
        if ".lora_B" in key:
            value.fill_(3e38)


def test_an_answer_that_breaks_off_is_said(
    postil: Any, generate: Any, adapter: Path, changed: Any, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = ("-a", f"evil={changed(adapter, 'adapter_model.safetensors', overflowing)}")
    said = "the adapter 'evil' gave values that are not finite (NaN or infinite) after 0 tokens of an answer"
    alone = postil(*generate, "Hello", *note)
    assert (alone.code, alone.out) == (2, "\n")
    assert said in " ".join(alone.err.split())
    lines = [{"prompt": "Hello", "adapter": "evil"}, {"prompt": "Hello"}]
    whole = answers(postil(*generate, "--requests", ask(lines[1])))[0]
    beside = postil(*generate, "--requests", ask(*lines), *note)
    broken, other = (json.loads(line) for line in beside.out.splitlines())
    assert (broken["text"], broken["finish_reason"], broken["new_tokens"]) == ("", "error", 0)
    assert broken["error"].startswith(said)
    assert other == whole
    assert beside.code == 2
    assert "1 of 2 answers broke off" in " ".join(beside.err.split())
    spoken = talk(postil, monkeypatch, "one\ntwo\n", *generate[1:], *note)
    assert spoken.code == 0
    assert " ".join(spoken.err.split()).count("this turn is left out of the conversation") == 2


def talk(postil: Any, monkeypatch: pytest.MonkeyPatch, text: str, *words: object) -> Any:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return postil("chat", *words)


def test_chat_has_a_seed_that_each_turn_moves_on(
    postil: Any, base: Path, generate: Any, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--base", base, "-n", 6, "--temperature", 2)
    result = talk(postil, monkeypatch, "one\ntwo\n", *words, "--seed", 3)
    assert result.code == 0
    assert talk(postil, monkeypatch, "one\ntwo\n", *words, "--seed", 3).out == result.out
    assert talk(postil, monkeypatch, "one\ntwo\n", *words, "--seed", 4).out != result.out
    messages = [{"role": "user", "content": "one"}]
    (first,) = answers(postil(*generate, "--requests", ask({"messages": messages, "temperature": 2.0, "seed": 3})))
    messages += [{"role": "assistant", "content": first["text"]}, {"role": "user", "content": "two"}]
    (same, next_) = answers(
        postil(*generate, "--requests", ask(*({"messages": messages, "temperature": 2.0, "seed": n} for n in (3, 4))))
    )
    assert result.out == f"{first['text']}\n{next_['text']}\n"
    assert same["text"] != next_["text"]


def test_chat_leaves_out_its_oldest_turns_where_the_context_is_full(
    postil: Any, base: Path, generate: Any, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--base", base, "-n", 6, "--system", "Be kind.")
    result = talk(postil, monkeypatch, f"{'a' * 40}\nb\n{'c' * 300}\n{'d' * 20}\n", *words)
    assert result.code == 0
    first, second, last = (line for line in result.out.splitlines() if line)
    assert result.err.count("outgrew the base's context of 128 tokens; its oldest turn was left out") == 1
    assert result.err.count("this message and 6 new tokens do not fit the base's context of 128 tokens;") == 1
    kept = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": second},
        {"role": "user", "content": "d" * 20},
    ]
    (expected,) = answers(postil(*generate, "--requests", ask({"messages": kept})))
    assert last == expected["text"].strip("\n")
    assert first


def test_a_directory_with_an_equals_sign_in_its_path(
    postil: Any, refusal: Any, generate: Any, adapter: Path, ask: Any, tmp_path: Path
) -> None:
    place = tmp_path / "lr=1e-3" / "adapter"
    shutil.copytree(adapter, place)
    asked = ask({"prompt": "a", "adapter": "lr=1e-3"}, {"prompt": "a", "adapter": "two"})
    words = ("--adapter", place, "--adapter", f"two={place}", "--requests", asked)
    assert [answer["adapter"] for answer in answers(postil(*generate, *words))] == ["lr=1e-3", "two"]
    missing = place.with_name("adaptr")
    assert f"{missing} does not exist" in refusal(*generate, "hi", "--adapter", missing)


def test_two_notes_of_one_name(refusal: Any, generate: Any, adapter: Path, tmp_path: Path) -> None:
    other = tmp_path / "run" / "adapter"
    shutil.copytree(adapter, other)
    message = refusal(*generate, "hi", "-a", adapter, "-a", other)
    assert message == f"{adapter} and {other} would both be called 'run'; name one, for example -a second={other}"


def test_what_speaks_against_each_note_is_said(
    postil: Any, generate: Any, adapter: Path, ask: Any, tmp_path: Path
) -> None:
    words = list[object]()
    for name in ("one", "two"):
        shutil.copytree(adapter, tmp_path / name)
        (tmp_path / name / "postil.json").unlink()  # it says which base the adapter was made for
        words += ["--adapter", tmp_path / name]
    result = postil(*generate, *words, "--requests", ask({"prompt": "a", "adapter": "one"}))
    assert result.code == 0
    assert "note: one: " in result.err
    assert "note: two: " in result.err
    assert "note: " not in postil(*generate, "hi", "--adapter", adapter).err


def test_a_note_of_another_base(postil: Any, refusal: Any, base: Path, adapter: Path, changed: Any) -> None:
    other = changed(base, "model.safetensors", lambda tensors: tensors["model.norm.weight"].add_(1))
    for words in (("generate", "hi", "-n", 2, "-a", adapter), ("merge", adapter, "--out", other / "merged")):
        message = refusal(*words, "--base", other)
        assert message.startswith(f"the adapter belongs to another base: it was made for {base} (sha256:")
        assert f"this is {other} (sha256:" in message
        assert "--force" in message
    assert postil("generate", "hi", "-n", 2, "-a", adapter, "--base", other, "--force").code == 0
    assert postil("merge", adapter, "--base", other, "--out", other / "merged", "--force").code == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "a", "adapter": "rnu"}, "ask.jsonl:1: no adapter 'rnu' (did you mean 'run'?); there are: run"),
        ({"promt": "a"}, "ask.jsonl:1: request: unknown key 'promt' (did you mean 'prompt'?)"),
        ({"prompt": 3}, "ask.jsonl:1: request: prompt: Input should be a valid string (found 3)"),
        ({"prompt": "a", "stop": "b"}, "ask.jsonl:1: request: stop: Input should be a valid list (found 'b')"),
        ({"prompt": "a", "temperature": "x"}, "ask.jsonl:1: request: temperature: Input should be a valid number"),
        (
            {"prompt": "a", "max_new_tokens": 1.5},
            "request: max_new_tokens: Input should be a valid integer (found 1.5)",
        ),
        (
            {"messages": [{"role": "usr", "content": "x"}]},
            "message 1 has the unknown role 'usr' (did you mean 'user'?)",
        ),
        ({"prompt": "a\ud800"}, "ask.jsonl:1: the text holds half a surrogate pair ('\\ud800'), which is no text"),
        ({"prompt": "x" * 200}, "219 prompt tokens and 6 new ones do not fit the base's context of 128"),
        ({"adapter": "run"}, "ask.jsonl:1 gives none: give one of ids, prompt and messages"),
        ("[1]", 'ask.jsonl:1: a request is an object such as {"prompt": "Hello"}'),
        ('{"prompt"', "ask.jsonl:1: not JSON (Expecting ':' delimiter"),
        ('{"prompt": "a", "prompt": "b"}', "ask.jsonl:1: not JSON (the key 'prompt' comes twice in one object)"),
        ('{"prompt": ' + "[" * 100_000, "ask.jsonl:1: not JSON (maximum recursion depth"),
        ("", "ask.jsonl holds no request; write one a line"),
    ],
)
def test_wrong_requests(refusal: Any, generate: Any, adapter: Path, ask: Any, line: Any, said: str) -> None:
    assert said in refusal(*generate, "--adapter", adapter, "--requests", ask(line))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give a prompt or --requests FILE, for example: postil generate"),
        (["hi", "--requests", "x.jsonl"], "give a prompt or --requests FILE"),
        (["--requests", "no.jsonl"], "no.jsonl cannot be read: No such file"),
        (["hi", "--device", "cdua"], "'cdua' is no device (did you mean 'cuda'?)"),
        (["hi", "--dtype", "bfloat61"], "'bfloat61' is no dtype for a base (did you mean 'bfloat16'?)"),
        (["hi", "-n", "0"], "request 1: max_new_tokens must be at least 1"),
        (["hi", "--temperature", "-1"], "request 1: temperature must be a number from 0"),
        (["hi", "--adaptor", "x"], "No such option --adaptor (did you mean --adapter?)"),
        (
            ["hi", "--adapter", "no-such-place"],
            "no-such-place does not exist; name a directory that holds adapter_config",
        ),
        (["a\udcff"], "request 1: the text holds half a surrogate pair"),
    ],
)
def test_slips_in_options(refusal: Any, generate: Any, words: list[str], said: str) -> None:
    assert said in refusal(*generate, *words)


def test_several_notes_for_one_prompt(refusal: Any, generate: Any, adapter: Path) -> None:
    message = refusal(*generate, "hi", "-a", adapter, "-a", f"b={adapter}")
    assert message == "several adapters were given for one prompt; give one, or name them in --requests"
