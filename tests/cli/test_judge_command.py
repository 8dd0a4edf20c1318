"""postil judge: the table and its sentence, what it writes, the gate's exit code, and each wrong input."""

from __future__ import annotations

import json
import shlex
import shutil
import xml.etree.ElementTree as xml
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from postil.judging.card.file import read_card
from postil.judging.card.model import ScoreCard


@pytest.fixture
def here(tmp_path: Path, adapter: Path) -> Path:
    """The trained adapter, its test rows, and general text, in a place of their own."""
    shutil.copytree(adapter, tmp_path / "note")
    rows = [{"prompt": f"Say {n}", "completion": "yes " * (n % 3 + 1), "rest": str(n % 2)} for n in range(20, 44)]
    text = [{"text": f"Line {n} of some text, {n * n} times over, that nobody has learned."} for n in range(12)]
    for name, lines in (("test", rows), ("text", text), ("pairs", [{"good": "a b c d", "bad": "d c b a"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


@pytest.fixture
def judge(postil: Any, base: Path, here: Path) -> Callable[..., Any]:
    """judge("--gate", ...): the command's Result on `here`."""

    def run(*words: object) -> Any:
        sets = ("--target", here / "test.jsonl", "--general", here / "text.jsonl", "--chat", "none",
                "--set", "general.window=64", "--set", "max_new_tokens=4")  # fmt: skip
        return postil("judge", here / "note", "--base", base, *sets, *words)

    return run


def test_a_table_and_one_sentence(judge: Any, here: Path) -> None:
    result = judge("--metrics", "exact_match,chrf", "--slices", "rest")
    assert result.code == 0, result
    lines = result.out.splitlines()
    for measure in ("target.exact_match", "target.chrf", "target.nats", "general.nats", "general.kl",
                    "target.rest=0", "target.rest=1"):  # fmt: skip
        (line,) = [line for line in lines if line.split()[0] == measure]
        told = any(verdict in line for verdict in ("better", "no evidence", "worse"))
        assert told is (measure != "general.kl")  # a distance from the base is neither
    assert lines[0].split() == [
        "measure", "base", "few-shot", "adapter", "difference", "verdict", "allowed", "visible", "from"
    ]  # fmt: skip
    assert "best of the baselines (few shot, most frequent, copy prompt, copy last line" in result.out
    assert "few-shot examples and baselines are from the rows that the recipe names" in result.out
    assert f"target: {here / 'test.jsonl'}, 24 rows" in result.out
    assert lines[-1].endswith(".")
    assert "on the target: exact_match" in lines[-1]
    assert "in general: general.nats" in lines[-1]
    assert "within the +0.05 nats/token that the gate allows" in lines[-1]
    (line,) = [line for line in lines if line.split()[0] == "general.nats"]
    assert "+0.05 nats/token" in line
    card = read_card(here / "note")
    assert card is not None
    assert card.target is not None
    assert list(card.target.measures) == ["exact_match", "chrf", "nats"]


def test_the_cards_own_command_makes_it_again(judge: Any, postil: Any, here: Path) -> None:
    done = judge("--metrics", "exact_match", "--null", 2, "--curve", "--shots", 1, "--train", here / "test.jsonl",
                 "--pairs", here / "pairs.jsonl")  # fmt: skip
    assert done.code == 2
    assert "has 0 rows that the target does not ask itself" in done.err
    done = judge("--metrics", "exact_match", "--null", 2, "--curve", "--pairs", here / "pairs.jsonl")
    assert done.code == 0, done
    card = read_card(here / "note")
    assert card is not None
    assert (card.null_adapters, len(card.curve)) == (2, 6)
    assert "z: in units of the spread of 2 random adapters" in done.out
    assert "scale 1.25: target nats" in done.out
    words = shlex.split(card.command)
    assert words[0] == "postil"
    again = postil(*words[1:])
    assert again.code == 0, again
    assert read_card(here / "note") == card
    assert again.out == done.out


def test_few_shot_leakage_and_predictions(judge: Any, here: Path, rows: Path) -> None:
    out = here / "answers.jsonl"
    result = judge("--shots", 1, "--train", rows, "--leakage", rows, "--predictions", out, "--metrics", "exact_match",
                   "--set", "leakage.prefix_tokens=0", "--set", "leakage.matched_tokens=4")  # fmt: skip
    assert result.code == 0, result
    assert result.out.split()[:3] == ["measure", "base", "few-shot"]
    assert "few-shot: the base with 1 examples" in result.out
    assert "leakage (4 tokens word for word, 20 training rows): adapter" in result.out
    sides = [json.loads(line)["side"] for line in out.read_text().splitlines()]
    assert sides[:3] == ["base", "adapter", "few-shot"]


def test_the_gate_lets_through_or_refuses_with_3(judge: Any, here: Path) -> None:
    out, report = here / "out.json", here / "gate.xml"
    passed = judge("--gate", "general.nats < base + 100", "--json", out, "--junit", report)
    assert (passed.code, passed.out.splitlines()[-1][:7]) == (0, "passed:"), passed
    told = json.loads(out.read_text())
    assert told["gate"]["passed"] is True
    assert ScoreCard.parse(told["score_card"]) == read_card(here / "note")
    assert xml.parse(report).getroot().get("failures") == "0"
    refused = judge("--gate", "general.nats < base - 100", "--json", out, "--junit", report)
    assert refused.code == 3
    assert refused.err.startswith("postil: refused: general.nats")
    assert "target.nats" in refused.out  # the table is shown all the same
    assert json.loads(out.read_text())["gate"]["passed"] is False
    assert xml.parse(report).getroot().get("failures") == "1"


def test_without_general_text_the_gate_refuses(judge: Any, postil: Any, base: Path, here: Path) -> None:
    result = postil("judge", here / "note", "--base", base, "--target", here / "test.jsonl", "--general", "none",
                    "--chat", "none", "--gate", "target.nats < 100", "--set", "max_new_tokens=4")  # fmt: skip
    assert result.code == 3
    assert "no general data" in result.err


def test_the_version_in_service_is_compared_with(judge: Any, here: Path) -> None:
    shutil.copytree(here / "note", here / "live")
    words = ("--gate", "target.nats <= live and general.nats.high <= live", "--live", here / "live")
    unjudged = judge(*words)
    assert unjudged.code == 2
    assert "live holds no score card to compare with; judge it first" in unjudged.err
    assert judge().code == 0
    shutil.copy(here / "note/postil.json", here / "live/postil.json")
    same = judge(*words)
    assert same.code == 0, same
    assert "live (row by row 0 [0, 0])" in same.out
    other = judge(*words, "--set", "general.window=32")  # other rows
    assert other.code == 3
    assert "general.nats was judged on other rows" in other.err


def test_the_card_can_be_left_out(judge: Any, here: Path) -> None:
    assert judge("--no-keep").code == 0
    assert read_card(here / "note") is None


def test_a_fine_tuned_model_beside_its_base(postil: Any, base: Path, here: Path) -> None:
    shutil.copytree(base, here / "model")
    result = postil("judge", here / "model", "--base", base, "--target", here / "test.jsonl",
                    "--metrics", "exact_match", "--set", "max_new_tokens=4")  # fmt: skip
    assert result.code == 0, result
    assert "No evidence on the target: exact_match" in result.out
    assert json.loads((here / "model/postil.json").read_text())["card"]["score_card"]["format"] == 1


def test_on_a_4_bit_base(judge: Any, here: Path) -> None:
    result = judge("--quant", "nf4", "--metrics", "exact_match", "--set", "rows.format=prompt")
    assert result.code == 0, result
    card = read_card(here / "note")
    assert card is not None
    assert card.base["form"] == "nf4"
    assert "--quant nf4" in card.command
    assert """--set 'rows.format="prompt"'""" in card.command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--metrics", "exact_mach"), "unknown metric 'exact_mach' (did you mean 'exact_match'?)"),
        (("--gate", "target.blue >"), "gate expression, column 14"),
        (
            ("--gate", "target.blue > base"),
            "gate expression, column 1: the score card will hold no measure 'target.blue'",
        ),
        (("--gate", "general.nat < base"), "will hold no measure 'general.nat' (did you mean 'general.nats'?)"),
        (("--gate", "slices.nas is not worse", "--slices", "rest"), "will hold no measure 'slices.nas'"),
        (("--junit", "out.xml"), "--junit is about the gate; give --gate too, for example --gate default"),
        (("--set", "genral.window=3"), "judge: unknown key 'genral' (did you mean 'general'?)"),
        (("--set", "general.window=3"), "judge: general: window: Input should be greater than or equal to 8"),
        (("--set", "seed"), "--set seed: write key=value"),
        (("--slices", "rset"), "slices: no row has a column 'rset' (did you mean 'rest'?)"),
        (("--null", 1), "judge: null: one random adapter has no spread to compare with"),
        (("--quant", "nf5"), "'nf5' is no 4-bit form of a base (did you mean 'nf4'?)"),
        (("--choices", "nothing.jsonl"), "nothing.jsonl does not exist"),
        (("--shots", 99), "rows that the target does not ask itself; --shots 99 needs as many"),
        (
            ("--shots", 2, "--set", "rows.format=text"),
            "the columns 'prompt', 'completion', 'rest' are not known; wanted: text",
        ),
    ],
)
def test_a_slip_is_one_sentence(refusal: Any, base: Path, here: Path, words: tuple[object, ...], said: str) -> None:
    given = (
        "judge",
        here / "note",
        "--base",
        base,
        "--target",
        here / "test.jsonl",
        "--general",
        here / "text.jsonl",
    )
    assert said in refusal(*given, *words)
    assert read_card(here / "note") is None


def test_an_adapter_that_is_not_there(refusal: Any, base: Path, here: Path) -> None:
    assert "nowhere does not exist" in refusal("judge", here / "nowhere", "--base", base)


def test_the_sentence_names_the_best_baseline() -> None:
    from postil.judging.card.model import Estimate, verdict_of
    from postil.reporting.card_words import sentence

    def estimate(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 1, "high": value + 1}

    def comparison(base: float) -> dict[str, Any]:
        values = {"base": estimate(base), "adapter": estimate(55), "difference": estimate(55 - base)}
        fixed = {"metric": "accuracy", "better": "higher", "unit": "%", "rows": 60, "detectable": 9}
        gap = Estimate(**estimate(55 - base))
        return fixed | values | {"verdict": verdict_of("higher", gap)}

    def said(**baselines: float) -> str:
        beside = {name: {"accuracy": comparison(value)} for name, value in baselines.items()}
        target = {"data": {"name": "t", "sha256": "x", "rows": 60}, "main": "accuracy", "baselines": beside,
                  "measures": {"accuracy": comparison(0)}}  # fmt: skip
        return sentence(ScoreCard.parse({"base": {}, "adapter_sha256": "x", "command": "x", "target": target}))

    assert said() == "Better on the target: accuracy 0.0 → 55.0 % (+55.0, +54.0 to +56.0)."
    assert said(copy_prompt=3, nearest_row=20) == (
        "Better on the target: accuracy 0.0 → 55.0 % (+55.0, +54.0 to +56.0), and than nearest row (20.0)."
    )
    assert said(random_option=54.5, copy_prompt=0) == (
        "Target.accuracy is not better than the best trivial baseline's, random_option: 54.5% → 55%, difference 0.5 "
        "[-0.5, 1.5], no evidence either way (these 60 rows show 9 or more)."
    )
