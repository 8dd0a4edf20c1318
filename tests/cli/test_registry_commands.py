"""publish, registry list, show, promote, rollback, policy …, and answers from published notes, on a tiny base."""

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
from cards import card, changed
from postil.adapter.identity import update_card

Refusal = Callable[..., str]


@pytest.fixture
def judge(adapter: Path, tmp_path: Path) -> Callable[..., Path]:
    """judge(name, scale=…, …): a copy of the trained adapter, its B scaled, with a card of its own."""

    def make(
        name: str, scale: float = 1.0, scope: str = "assistant", source: str | None = None, **measures: Any
    ) -> Path:
        from safetensors.torch import load_file, save_file

        place = Path(shutil.copytree(adapter, tmp_path / name))
        tensors = load_file(place / "adapter_model.safetensors")
        scaled = {key: value * scale if "lora_B" in key else value for key, value in tensors.items()}
        save_file(scaled, place / "adapter_model.safetensors", metadata={"format": "pt"})
        own = json.loads((place / "postil.json").read_text())
        own["base"]["source"] = source or own["base"]["source"]
        (place / "postil.json").write_text(json.dumps(own))
        made = changed(card(bytes_of=place, source=own["base"]["source"], **measures), scope=scope)
        update_card(place, score_card=made.model_dump(mode="json"))
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
    back = postil("registry", "rollback", "support")
    assert (back.code, back.out) == (0, one.out)
    assert answer("support@live") == before
    assert postil("registry", "promote", "support", two.out[:8]).out == two.out
    listing = postil("registry", "list").out.splitlines()
    assert listing == ["support  2 versions", f"  {one.out[:12]}", f"  {two.out[:12]}  live"]
    shown = postil("registry", "show", "support").out
    assert two.out.strip() in shown
    assert "nats 2.9 → 2.93 nats/token, difference 0.03 [0.02, 0.04]: worse" in shown
    assert "scope  anything (assistant)" in shown
    assert [line.split()[3] for line in shown.splitlines()[-4:]] == ["publish", "publish", "rollback", "promote"]


def test_the_short_forms_stay(postil: Any, judge: Any, registry: Path) -> None:
    one, two = (postil("publish", judge(name, scale=n), "--as", "support").out for n, name in enumerate("ab", 2))
    assert postil("list").out == postil("registry", "list").out
    assert postil("show", "support").out == postil("registry", "show", "support").out
    assert postil("rollback", "support").out == one
    assert postil("promote", "support", two[:8]).out == two
    words = {line.split()[0] for line in postil("--help").out.splitlines() if line.strip()}
    assert {"publish", "registry"} <= words
    assert not {"list", "show", "promote", "rollback"} & words


def test_a_refusal_is_exit_code_3_a_sentence_json_and_junit(
    postil: Any, judge: Any, registry: Path, tmp_path: Path
) -> None:
    bad = judge("bad", nats=3.12)
    reports = ["--json", tmp_path / "gate.json", "--junit", tmp_path / "gate.xml"]
    assert postil("registry", "policy", "support", "--gate", "general.nats < base + 0.05").code == 0
    result = postil("publish", bad, "--as", "support", *reports)
    assert (result.code, result.out) == (3, "")
    sentence = "refused: general.nats 3.12 is not below base + 0.05 = 2.95"
    assert result.raw_err == f"postil: {sentence}\n"
    assert json.loads((tmp_path / "gate.json").read_text())["sentence"] == sentence
    suite = ET.parse(tmp_path / "gate.xml").getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("1", "1")
    overridden = postil("publish", bad, "--as", "support", "--override", "a demo tomorrow", *reports)
    assert overridden.code == 0, overridden
    assert "note: the policy was overridden, which is logged" in overridden.err
    assert json.loads((tmp_path / "gate.json").read_text())["passed"] is False
    shown = postil("registry", "show", "support").out
    assert "override live" in shown
    assert "because: a demo tomorrow" in shown
    assert postil("registry", "policy", "support", "--gate", "general.nats < base + 0.3").code == 0
    again = postil("publish", bad, "--as", "support", *reports)
    assert "published before; it is the same version support@live pointed already at" in again.err
    assert json.loads((tmp_path / "gate.json").read_text())["passed"] is True
    assert postil("registry", "list").out.splitlines()[0] == "support  1 version, 1 refused"


def test_a_promotion_is_asked_too(postil: Any, judge: Any, registry: Path, tmp_path: Path) -> None:
    postil("publish", judge("good"), "--as", "support")
    postil("registry", "policy", "support", "--alias", "staging", "--gate", "general.nats < base + 100")
    staged = postil("publish", judge("bad", scale=3, nats=4.9), "--as", "support", "--alias", "staging")
    assert staged.code == 0, staged
    refused = postil("registry", "promote", "support", "staging", "--json", tmp_path / "gate.json")
    assert (refused.code, refused.out) == (3, "")
    assert "refused: " in refused.err
    assert json.loads((tmp_path / "gate.json").read_text())["passed"] is False
    assert postil("registry", "promote", "support", "staging", "--override", "").code == 2
    moved = postil("registry", "promote", "support", "staging", "--override", "we must")
    assert (moved.code, moved.out) == (0, staged.out)


def test_a_gate_that_the_publisher_brings_is_told_where_it_belongs(
    refusal: Refusal, judge: Any, registry: Path
) -> None:
    said = refusal("publish", judge("a"), "--as", "support", "--gate", "target.bleu > 5")
    assert 'postil registry policy support --alias live --gate "target.bleu > 5"' in said
    assert "--override" in said
    assert not registry.exists()


def test_a_passing_policy_still_names_worse_slices(postil: Any, judge: Any, registry: Path) -> None:
    sliced = judge("sliced", slices={"refund": 30, "order": 80})
    refused = postil("publish", sliced, "--as", "support")
    assert refused.code == 3
    assert "refund" in refused.err
    postil("registry", "policy", "support", "--gate", "target.bleu > base")
    passed = postil("publish", sliced, "--as", "support")
    assert passed.code == 0
    assert "note: slices that got worse: intent=refund" in passed.err


def test_a_policy_is_shown_and_set(postil: Any, refusal: Refusal, judge: Any, registry: Path) -> None:
    shown = postil("registry", "policy", "support")
    assert shown.code == 0, shown
    assert "(the default)" in shown.out
    assert not registry.exists()
    words = ["--gate", "target.bleu > base", "--scope", "assistant", "--override-by", "alice,bob"]
    assert postil("registry", "policy", "support", *words, "--reason", "agreed").code == 0
    lines = postil("registry", "policy", "support").out.splitlines()
    told = {line.split()[0]: line.split(None, 1)[1] for line in lines}
    assert told == {
        "gate": "target.bleu > base", "scope": "assistant alone", "base": "the one that the name is bound to",
        "overriders": "alice, bob",
    }  # fmt: skip
    assert postil("registry", "policy", "support", "--override-by", "nobody", "--base", "sha256:x").code == 0
    assert "none" in postil("registry", "policy", "support").out
    refused = postil("publish", judge("a"), "--as", "support")
    assert (refused.code, "bound to the base sha256:x" in refused.err) == (3, True)
    assert postil("registry", "policy", "support", "--override-by", "anyone", "--base", "bound").code == 0
    assert postil("publish", judge("b"), "--as", "support").code == 0
    shown = postil("registry", "show", "support").out
    assert "policy  live: gate target.bleu > base; scope assistant alone" in shown
    assert "because: agreed" in shown
    assert "'assistant' or 'task'" in refusal("registry", "policy", "support", "--scope", "all")
    assert "column 1: unknown measure 'taget'" in refusal("registry", "policy", "support", "--gate", "taget > 5")
    assert "name what changes as well" in refusal("registry", "policy", "support", "--reason", "why not")


def test_a_name_is_bound_to_its_base(postil: Any, judge: Any, registry: Path) -> None:
    postil("publish", judge("a"), "--as", "support")
    foreign = judge("b", source="sha256:other")
    refused = postil("publish", foreign, "--as", "support")
    assert (refused.code, "--new-base" in refused.err) == (3, True)
    assert postil("publish", foreign, "--as", "support", "--new-base").code == 0
    assert "rebind live" in postil("registry", "show", "support").out


def test_a_note_for_its_task_alone_is_told(postil: Any, judge: Any, registry: Path) -> None:
    published = postil("publish", judge("a", scope="task"), "--as", "support")
    assert "note: this version is for its own task alone" in published.err
    assert postil("registry", "list").out.splitlines()[1].endswith("live  (for its own task alone)")
    assert "scope  its own task alone (task)" in postil("registry", "show", "support").out


def test_retired_deleted_unpublished_collected(postil: Any, refusal: Refusal, judge: Any, registry: Path) -> None:
    one, two = (postil("publish", judge(name, scale=n), "--as", "support").out for n, name in enumerate("ab", 2))
    assert "points at" in refusal("registry", "retire", "support", two[:8])
    assert postil("registry", "retire", "support", one[:8], "--reason", "wrong rows").code == 0
    assert postil("registry", "list").out.splitlines()[0] == "support  1 version, 1 retired"
    assert "removed 0 versions, 0.0 MB" in postil("registry", "gc").err
    assert f"would remove 1 version ({one[:12]})" in postil("registry", "gc", "--grace", 0, "--dry-run").err
    assert f"removed 1 version ({one[:12]})" in postil("registry", "gc", "--grace", 0).err
    assert "every byte is as it was published" in postil("registry", "verify").err
    postil("registry", "promote", "support", two[:8], "--alias", "canary")
    assert "support@canary is gone" in postil("registry", "delete-alias", "support", "canary").err
    assert "has no alias 'canary'" in refusal("registry", "delete-alias", "support", "canary")
    assert "nothing is in service" in postil("registry", "unpublish", "support").err
    assert "its versions were retired" in refusal("registry", "show", "support")


def test_the_card_of_a_real_judgement_goes_through_the_gate(
    postil: Any, adapter: Path, base: Path, rows: Path, registry: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(adapter, tmp_path / "judged"))
    judged = postil("judge", place, "--base", base, "--target", rows, "--set", "resamples=100")
    assert judged.code == 0, judged
    gate = "target.nats < base and general.nats.high < base + 1 and general.kl < 1 and not target is worse"
    assert postil("registry", "policy", "support", "--gate", gate).code == 0
    result = postil("publish", place, "--as", "support")
    assert result.code == 0, result
    assert "passed: target.nats " in result.err
    assert postil("registry", "policy", "support", "--gate", f"target is better and {gate}").code == 0
    assert "no evidence" in postil("publish", place, "--as", "support").err
    without = postil("judge", place, "--base", base, "--target", rows, "--general", "none", "--chat", "none",
                     "--set", "resamples=100")  # fmt: skip
    assert without.code == 0, without
    assert postil("registry", "policy", "support", "--gate", gate).code == 0
    refused = postil("publish", place, "--as", "support")
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
    postil("publish", judge("first"), "--as", "support")
    blobs = {path.name: path for path in (registry / "blobs").iterdir()}
    assert len(blobs) == 4
    weights = max(blobs.values(), key=lambda path: path.stat().st_size)
    content = weights.read_bytes()
    weights.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    for words in (["generate", "Say 1", "--base", base, "-a", "support@live"], ["registry", "verify"]):
        said = refusal(*words)
        assert f"{weights} was changed after it was published: it is adapter_model.safetensors of version" in said
    weights.write_bytes(content)
    assert postil("registry", "verify").code == 0
    assert postil("generate", "Say 1", "--base", base, "-a", "support@live", "-n", 1).code == 0
    weights.write_bytes(b"")
    assert postil("generate", "Say 1", "--base", base, "-a", "support@live", "-n", 1).code == 0  # of verified bytes


def test_slips_are_sentences(
    postil: Any, refusal: Refusal, judge: Any, base: Path, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is no directory; `postil publish` makes" in refusal("list")
    postil("publish", judge("second"), "--as", "support")
    assert "nothing is published as 'suport' (did you mean 'support'?)" in refusal("show", "suport")
    assert "has no version before" in refusal("rollback", "support")
    assert "names no alias and no version after the @" in refusal("show", "support@")
    assert "of the kind postgresql://, and this postil keeps registries in directories only" in refusal(
        "list", "--registry", "postgresql://me@host/db"
    )
    assert "neither an alias nor a version" in refusal("promote", "support", "ffff")
    assert "cannot be an alias" in refusal("promote", "support", "live", "--alias", "Beef")
    monkeypatch.delenv("POSTIL_REGISTRY")
    assert "Name its directory with --registry DIR" in refusal("list")
    asked = ["generate", "Say 1", "--base", base, "--adapter", "support@live"]
    assert "names no alias and no version after the @" in refusal(*asked[:-1], "support@")
    assert "add --registry DIR or set POSTIL_REGISTRY" in refusal(*asked)
    assert postil(*asked, "--registry", registry, "-n", 1).code == 0
