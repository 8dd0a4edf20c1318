"""publish, list, show, promote, rollback, and answers from published notes: the whole way on a tiny base."""

from __future__ import annotations

import json
import shutil
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from cards import card
from postil.adapter.identity import update_card

Refusal = Callable[..., str]


@pytest.fixture
def judge(adapter: Path, tmp_path: Path) -> Callable[..., Path]:
    """judge(name, scale=…, …): a copy of the trained adapter, its B scaled, with a card of its own."""

    def make(name: str, scale: float = 1.0, **measures: Any) -> Path:
        from safetensors.torch import load_file, save_file

        place = Path(shutil.copytree(adapter, tmp_path / name))
        tensors = load_file(place / "adapter_model.safetensors")
        scaled = {key: value * scale if "lora_B" in key else value for key, value in tensors.items()}
        save_file(scaled, place / "adapter_model.safetensors", metadata={"format": "pt"})
        source = json.loads((place / "postil.json").read_text())["base"]["source"]
        update_card(place, score_card=card(bytes_of=place, source=source, **measures).model_dump(mode="json"))
        return place

    return make


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The registry that POSTIL_REGISTRY names."""
    place = tmp_path / "registry"
    monkeypatch.setenv("POSTIL_REGISTRY", str(place))
    return place


def test_publish_answer_roll_back(postil: Any, judge: Any, base: Path, registry: Path) -> None:
    first, second = judge("first"), judge("second", scale=-40)

    def answer(adapter: str | Path) -> str:
        result = postil("generate", "Say 1", "--base", base, "--adapter", adapter, "-n", 12)
        assert result.code == 0, result
        return str(result.out)

    one = postil("publish", first, "--as", "support")
    assert one.code == 0, one
    assert "passed: target is better than the base's: 30 points → 60 points" in one.err
    before = answer("support@live")
    assert before == answer(first)
    two = postil("publish", second, "--as", "support")
    assert answer("support") == answer(second) != before
    assert answer(f"note=support@{one.out[:8]}") == before
    back = postil("rollback", "support")
    assert (back.code, back.out) == (0, one.out)
    assert answer("support@live") == before
    assert postil("promote", "support", two.out[:8]).out == two.out
    listing = postil("list").out.splitlines()
    assert listing == ["support  2 versions", f"  {one.out[:12]}", f"  {two.out[:12]}  live"]
    shown = postil("show", "support").out
    assert two.out.strip() in shown
    assert "nats 2.9 → 2.93 nats/token, difference 0.03 [0.02, 0.04]: worse" in shown
    assert [line.split()[3] for line in shown.splitlines()[-4:]] == ["publish", "publish", "rollback", "promote"]


def test_a_refusal_is_exit_code_3_a_sentence_json_and_junit(
    postil: Any, judge: Any, registry: Path, tmp_path: Path
) -> None:
    bad = judge("bad", nats=3.12)
    reports = ["--json", tmp_path / "gate.json", "--junit", tmp_path / "gate.xml"]
    result = postil("publish", bad, "--as", "support", *reports)
    assert (result.code, result.out) == (3, "")
    sentence = (
        "refused: general.nats is worse than allowed: 2.9 nats/token → 3.12 nats/token, difference 0.22 [0.21, "
        "0.23], +0.05 nats/token allowed"
    )
    assert result.raw_err == f"postil: {sentence}\n"
    assert json.loads((tmp_path / "gate.json").read_text())["sentence"] == sentence
    suite = ET.parse(tmp_path / "gate.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("6", "1")  # target, nats, and four measures of chat
    accepted = postil("publish", bad, "--as", "support", "--gate", "general.nats < base + 0.3", *reports)
    assert accepted.code == 0, accepted
    assert json.loads((tmp_path / "gate.json").read_text())["passed"] is True
    again = postil("publish", bad, "--as", "support", "--gate", "general.nats < base + 0.3")
    assert "published before; it is the same version support@live pointed already at" in again.err
    assert postil("list").out.splitlines()[0] == "support  1 version, 1 refused"


def test_a_passing_gate_still_names_worse_slices(postil: Any, judge: Any, registry: Path) -> None:
    sliced = judge("sliced", slices={"refund": 30, "order": 80})
    refused = postil("publish", sliced, "--as", "support")
    assert refused.code == 3
    assert "refused: slice intent=refund: accuracy is worse than allowed" in refused.err
    passed = postil("publish", sliced, "--as", "support", "--gate", "target.bleu > base")
    assert passed.code == 0
    assert "note: slices that got worse: intent=refund" in passed.err


def test_the_card_of_a_real_judgement_goes_through_the_gate(
    postil: Any, adapter: Path, base: Path, rows: Path, registry: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(adapter, tmp_path / "judged"))
    judged = postil("judge", place, "--base", base, "--target", rows, "--set", "resamples=100")
    assert judged.code == 0, judged
    gate = "target.nats < base and general.nats.high < base + 1 and general.kl < 1 and not target is worse"
    result = postil("publish", place, "--as", "support", "--gate", gate)
    assert result.code == 0, result
    assert "passed: target.nats " in result.err
    assert "no evidence" in postil("publish", place, "--as", "support", "--gate", f"target is better and {gate}").err
    without = postil("judge", place, "--base", base, "--target", rows, "--general", "none", "--chat", "none",
                     "--set", "resamples=100")  # fmt: skip
    assert without.code == 0, without
    refused = postil("publish", place, "--as", "support", "--gate", gate)
    assert refused.code == 3
    assert "refused: the card holds no general data" in refused.err


def test_an_adapter_that_was_not_judged_is_told_how(postil: Any, adapter: Path, registry: Path) -> None:
    result = postil("publish", adapter, "--as", "support")
    assert result.code == 3
    assert f"postil judge {adapter} --base" in result.err
    assert not registry.exists()


def test_a_changed_byte_is_refused_where_it_is_used(
    postil: Any, refusal: Refusal, judge: Any, base: Path, registry: Path
) -> None:
    version = postil("publish", judge("first"), "--as", "support").out.strip()
    for name in ("adapter_model.safetensors", "postil.json"):
        file = registry / "versions" / version / name
        content = file.read_bytes()
        file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        for words in (["generate", "Say 1", "--base", base, "-a", "support@live"], ["show", "support"]):
            assert f"{file} was changed after it was published" in refusal(*words)
        file.write_bytes(content)
    assert postil("show", "support").code == 0


def test_slips_are_sentences(
    postil: Any, refusal: Refusal, judge: Any, base: Path, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is no directory; `postil publish` makes" in refusal("list")
    assert "column 1: unknown measure 'taget.bleu' (did you mean 'target'?)" in refusal(
        "publish", judge("first"), "--as", "support", "--gate", "taget.bleu > 5"
    )
    postil("publish", judge("second"), "--as", "support")
    assert "nothing is published as 'suport' (did you mean 'support'?)" in refusal("show", "suport")
    assert "has no version before" in refusal("rollback", "support")
    assert "neither an alias nor a version" in refusal("promote", "support", "ffff")
    assert "cannot be an alias" in refusal("promote", "support", "live", "--alias", "Beef")
    monkeypatch.delenv("POSTIL_REGISTRY")
    assert "Name its directory with --registry DIR" in refusal("list")
    asked = ["generate", "Say 1", "--base", base, "--adapter", "support@live"]
    assert "add --registry DIR or set POSTIL_REGISTRY" in refusal(*asked)
    assert postil(*asked, "--registry", registry, "-n", 1).code == 0
