"""The command line's one exit: slips in the words of a command, help, Ctrl-C, and a reader that goes away."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from postil import base as bases

LONG = "a" * 300


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "--bse", "x"], "postil: No such option --bse (did you mean --base?)"),
        (["generate", "--bse=x"], "postil: No such option --bse (did you mean --base?)"),
        (["trian"], "postil: No such command 'trian' (did you mean 'train'?)"),
        (["data", "shwo"], "postil: No such command 'shwo' (did you mean 'show'?)"),
        (["qqqq"], "postil: No such command 'qqqq' (see postil --help)"),
        (["inspect"], "postil: Missing argument 'adapter' (see postil inspect --help)"),
        (["generate", "hi"], "postil: Missing option '--base' / '-b' (see postil generate --help)"),
        (["base", "get", "a", "b"], "postil: Got unexpected extra argument(s) (b) (see postil base get --help)"),
        (["train", "--base"], "postil: Option '--base' requires an argument"),
    ],
)
def test_a_slip_is_one_sentence(postil: Any, words: list[str], said: str) -> None:
    result = postil(*words)
    assert (result.code, result.out, result.raw_err) == (2, "", f"{said}\n")


def test_help_and_no_words_at_all(postil: Any) -> None:
    result = postil("generate", "--help")
    assert (result.code, result.raw_err) == (0, "")
    assert result.out.startswith("Usage: postil generate [OPTIONS]")
    for words in ([], ["base"]):
        result = postil(*words)
        assert result.code == 2
        assert result.raw_err.startswith("Usage: postil ")
        assert "Commands:" in result.raw_err


@pytest.mark.parametrize(
    "words",
    [
        ("base", "show", LONG),
        ("plan", "--base", LONG),
        ("generate", "hi", "--base", LONG),
        ("inspect", LONG),
        ("data", "show", LONG, "--base", LONG),
        ("judge", LONG, "--base", LONG),
    ],
)
def test_a_path_that_the_system_refuses_is_one_sentence(refusal: Any, words: tuple[str, ...]) -> None:
    assert "File name too long" in refusal(*words)


def test_ctrl_c_is_130_and_one_word(postil: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bases, "list_entries", pressed)
    result = postil("base", "list")
    assert (result.code, result.out, result.raw_err) == (130, "", "postil: stopped\n")


def test_a_reader_that_goes_away(postil: Any) -> None:
    code = "import os, sys; from postil.cli import main; sys.argv = ['postil', '--help']; main()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read().decode()
        assert (process.wait(), said) == (1, "")
