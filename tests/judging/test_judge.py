"""judge: the whole card of an adapter and of a fine-tuned model, its probes, its files, and what goes wrong."""

from __future__ import annotations

import copy
import hashlib
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import postil
from postil.adapter import Adapter, LoraConfig, attach
from postil.adapter.identity import adapter_sha256, update_card
from postil.adapter.peft_files import load_adapter, save_adapter
from postil.base import Base, live_digest
from postil.data import DataOptions, load_data
from postil.errors import AdapterError, JudgeError, PostilError, StorageError
from postil.judging.asking.likelihoods import mean_nats, nats_and_kl, row_losses
from postil.judging.card.build import NATS
from postil.judging.card.file import read_card
from postil.judging.card.model import ScoreCard
from postil.judging.gate.gate import check
from postil.judging.judge import judge as judge_with_chat
from postil.judging.options import SCALES, JudgeOptions
from postil.judging.sets.general import read_general
from postil.registry import Registry
from postil.registry.policy import Policy

judge = partial(judge_with_chat, chat=None)  # chat: sets/test_chat.py

Rows = Callable[[int, int], list[dict[str, Any]]]
TEXT = [{"text": f"Line {n} of some text that nobody has learned, {n * n} times over."} for n in range(12)]
SMALL = {"general": {"window": 32}, "metrics": ("exact_match",)}


def options(**more: Any) -> JudgeOptions:
    return JudgeOptions(**(SMALL | more))


@pytest.fixture
def files(tmp_path: Path, taught: Adapter, rows: Rows) -> dict[str, Path]:
    """The adapter's directory, and its test and training rows."""
    found = {"adapter": save_adapter(taught, tmp_path / "adapter")}
    for name, ends in (("test", (40, 60)), ("train", (0, 40))):
        found[name] = tmp_path / f"{name}.jsonl"
        found[name].write_text("".join(json.dumps(row) + "\n" for row in rows(*ends)))
    return found


def test_an_adapter_whose_numbers_overflow_gets_no_card(base: Base, files: dict[str, Path], taught: Adapter) -> None:
    """Half an answer is none to score; without answers the likelihoods say it, and no gate passes them."""
    tensors = {
        key: torch.full_like(value, 3e38) if "lora_B" in key else value for key, value in taught.tensors.items()
    }
    evil = replace(taught, tensors=tensors)
    told = "answers of what is judged: the adapter 'judged' gave values that are not finite"
    with pytest.raises(JudgeError, match=rf"{told}.*\(20 of 20 answers broke off\)"):
        judge(base, evil, target=files["test"], general=TEXT, options=options())
    assert attach(base).residents == {}


def test_the_card_of_an_adapter_that_learned_its_task(base: Base, files: dict[str, Path], taught: Adapter) -> None:
    before = live_digest(base.model)
    told: list[dict[str, Any]] = []
    card = judge(
        base, files["adapter"], target=files["test"], train=files["train"], general=TEXT, watch=told.append,
        options=options(slices=("group",), shots=2),
    )  # fmt: skip
    target = card.target
    assert target is not None
    assert (target.main, list(target.measures)) == ("exact_match", ["exact_match", "nats"])
    main = card.find("target")
    assert main is card.find("target.exact_match")
    assert (main.base.value, main.adapter.value, main.verdict, main.rows) == (0, 100, "better", 20)
    assert card.find("target.nats").verdict == "better"
    assert card.find("general.nats").difference.value != 0
    assert (card.find("general.kl").base.value, card.find("general.kl").verdict) == (0, "worse")
    assert set(target.slices["group"]) == {"a", "b"}
    assert card.find("target.group=a").rows == 10
    assert (target.shots, list(target.few_shot)) == (2, ["exact_match"])
    assert (target.data.name, target.data.rows) == (str(files["test"]), 20)
    assert card.adapter_sha256 == adapter_sha256(files["adapter"])
    assert card.base == {"source": base.fingerprint().source, "form": "fp32"}
    assert set(card.versions) == {"postil", "torch", "transformers", "sacrebleu"}
    assert live_digest(base.model) == before
    assert attach(base).residents == {}  # detached: it can be attached anew
    phases = ["likelihoods of the base", "likelihoods of what is judged", "answers of the base",
              "answers of what is judged", "answers of the base with examples"]  # fmt: skip
    assert list(dict.fromkeys(event["phase"] for event in told)) == phases
    for phase in phases[2:]:
        assert [event for event in told if event["phase"] == phase][-1] == {"phase": phase, "done": 20, "total": 20}


def test_the_card_is_the_same_again_and_kept_beside_the_weights(base: Base, files: dict[str, Path]) -> None:
    before = adapter_sha256(files["adapter"])
    card = judge(base, files["adapter"], target=files["test"], general=TEXT, options=options())
    assert adapter_sha256(files["adapter"]) == before
    assert read_card(files["adapter"]) == card
    assert load_adapter(files["adapter"]).card["recipe"] == {"rows": {"format": "raw"}}
    assert judge(base, files["adapter"], target=files["test"], general=TEXT, options=options()) == card
    other = judge(base, files["adapter"], general=TEXT, options=options(), keep=False)
    assert other != card
    assert read_card(files["adapter"]) == card


def test_a_published_version_keeps_its_card(base: Base, files: dict[str, Path], tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    judge(base, files["adapter"], target=files["test"], general=TEXT, options=options())
    registry.set_policy("note", Policy(gate="target.exact_match >= 0 and general.nats > 0"))
    registry.publish(files["adapter"], "note")
    place = registry.resolve("note")
    card = judge(base, place, target=files["test"], general=TEXT, options=options())
    assert any("is a published version, which never changes" in note for note in card.notes)
    assert registry.resolve("note") == place  # every byte as it was
    with pytest.raises(AdapterError, match="is a published version, which never changes"):
        update_card(place, score_card={})


def test_an_adapter_in_memory_and_a_resident_are_what_they_would_be_on_disk(
    base: Base, files: dict[str, Path], taught: Adapter
) -> None:
    whole = judge(base, files["adapter"], target=files["test"], general=TEXT, options=options(), keep=False)
    mine = replace(taught, card=dict(taught.card))
    card = judge(base, mine, target=files["test"], general=TEXT, options=options())
    assert mine.card["score_card"] == card.model_dump(mode="json")
    assert ScoreCard.parse(mine.card["score_card"]) == card
    model = attach(attach(base), taught, name="mine")
    resident = judge(model, "mine", target=files["test"], general=TEXT, options=options())
    for other in (card, resident):
        assert (other.target, other.general, other.adapter_sha256) == (
            whole.target, whole.general, whole.adapter_sha256
        )  # fmt: skip
    assert (list(model.residents), model.active) == (["mine"], {"mine": 1.0})
    assert shlex.split(card.command)[:3] == ["postil", "judge", "ADAPTER"]


def test_rows_are_read_as_they_were_in_a_training_from_python(base: Base, rows: Rows, tmp_path: Path) -> None:
    data = load_data(rows(0, 8), base, DataOptions(format="raw"))
    model = attach(base, LoraConfig(r=2))
    adapter = postil.train(model, data, steps=2, batch_size=4, warmup=0)
    assert adapter is not None
    for one in (adapter, model.export("default")):
        assert one.card["recipe"]["rows"]["format"] == "raw"
        assert (one.card["recipe"]["training"]["steps"], one.card["result"]["steps"]) == (2, 2)
        assert (one.card["data"]["sha256"], one.card["data"]["samples"]) == (data.report.sha256, 8)
    postil.detach(model)
    place = save_adapter(adapter, tmp_path / "adapter")
    card = judge(base, place, target=rows(40, 44), general=None, options=options())
    assert card.target is not None
    assert card.target.data.tokens == sum(
        s.target_tokens for s in load_data(rows(40, 44), base, data.options).samples
    )
    again = attach(base, load_adapter(place))
    assert again.export("default").card["score_card"] == card.model_dump(mode="json")
    postil.train(again, data.samples, steps=1, batch_size=4, warmup=0)
    trained = again.export("default").card
    assert "score_card" not in trained
    assert (trained["data"]["sha256"], trained["data"]["samples"]) == (None, 8)


def test_an_adapter_made_elsewhere_gets_its_card_too(base: Base, files: dict[str, Path]) -> None:
    (files["adapter"] / "postil.json").unlink()
    card = judge(base, files["adapter"], general=TEXT, options=options())
    assert any("fingerprint" in note for note in card.notes)
    assert read_card(files["adapter"]) == card
    assert load_adapter(files["adapter"]).base == {}


def test_the_command_holds_what_is_not_by_default(base: Base, files: dict[str, Path]) -> None:
    card = judge(
        base, files["adapter"], target=files["test"], general=None, train=files["train"], keep=False,
        options=options(shots=1, null=2, curve=SCALES, slices=("group",), resamples=200),
    )  # fmt: skip
    words = shlex.split(card.command)
    assert words[:7] == ["postil", "judge", str(files["adapter"]), "--base", "tiny", "--dtype", "float32"]
    joined = " ".join(words)
    for part in (f"--target {files['test']}", f"--train {files['train']}", "--general none", "--metrics exact_match",
                 "--slices group", "--shots 1", "--null 2", "--curve", "--set resamples=200",
                 "--set general.window=32"):  # fmt: skip
        assert part in joined, part
    assert "seed" not in joined


def test_the_curve_begins_at_the_base_and_passes_through_the_adapter(base: Base, files: dict[str, Path]) -> None:
    card = judge(base, files["adapter"], target=files["test"], general=TEXT, keep=False,
                 options=options(curve=(0, 0.5, 1, 1.25), curve_answers=True))  # fmt: skip
    assert [point.scale for point in card.curve] == [0, 0.5, 1, 1.25]
    for point, side in ((card.curve[0], "base"), (card.curve[2], "adapter")):
        assert point.target_nats == getattr(card.find("target.nats"), side).value
        assert point.general_nats == getattr(card.find("general.nats"), side).value
        assert point.target == getattr(card.find("target"), side).value
    half = card.curve[1]
    assert half.target_nats is not None
    model = attach(attach(base), load_adapter(files["adapter"]), name="note")
    samples = load_data(files["test"], base, DataOptions(format="raw")).samples
    assert half.target_nats == pytest.approx(mean_nats(row_losses(model, samples, {"note": 0.5})), rel=1e-6)
    assert card.curve[0].target_nats > half.target_nats > (card.curve[2].target_nats or 0)


def test_random_adapters_of_equal_norm_are_the_noise_floor(base: Base, files: dict[str, Path]) -> None:
    card = judge(base, files["adapter"], target=files["test"], general=TEXT, keep=False,
                 options=options(null=3, null_answers=True))  # fmt: skip
    assert card.null_adapters == 3
    for path in ("target.nats", "general.nats", "general.kl"):
        assert card.find(path).z is not None, path
    nats = card.find("target.nats").z
    assert nats is not None
    assert nats < -3  # no random change of that size learns the task
    assert card.find("target").z is None  # none of them answers anything right, so they have no spread


def test_training_rows_that_come_back_are_found(
    base: Base, memorised: Adapter, secrets: list[dict[str, Any]], rows: Rows
) -> None:
    leak = {"prefix_tokens": 4, "matched_tokens": 16}
    card = judge(base, memorised, target=rows(0, 12), general=TEXT, leaks=secrets, keep=False,
                 options=options(rows={"format": "raw"}, leakage=leak))  # fmt: skip
    assert card.leakage is not None
    assert (card.leakage.rows, card.leakage.adapter.value, card.leakage.base.value) == (2, 100, 0)
    assert card.leakage.held_out is None  # "yes sir" is too short to tell
    assert sorted(card.leakage.worst_rows) == [1, 2]
    with pytest.raises(JudgeError, match="no row teaches 4 \\+ 16 tokens"):
        judge(base, memorised, leaks=rows(0, 3), options=options(rows={"format": "raw"}, leakage=leak))


def test_an_own_measure_is_tried_before_the_work_and_has_a_name_of_its_own(
    base: Base, files: dict[str, Path], tmp_path: Path
) -> None:
    own = tmp_path / "cheat.py"
    own.write_text("def bleu(answer, row):\n    return 100\n\ndef odd(answer, row):\n    raise EOFError\n")
    told: list[Any] = []
    with pytest.raises(JudgeError, match=r"row 1: .*cheat\.py:odd failed: EOFError \(line 5\)"):
        judge(base, files["adapter"], target=files["test"], general=TEXT, watch=told.append,
              options=options(metrics=(f"{own}:odd",)))  # fmt: skip
    assert told == []
    card = judge(base, files["adapter"], target=files["test"], general=TEXT, keep=False,
                 options=options(metrics=(f"{own}:bleu", "bleu"), slices=("group",)),
                 gate="target.own.bleu > base - 1 and slices.own.bleu > base - 1")  # fmt: skip
    assert card.target is not None
    assert list(card.target.measures) == ["own.bleu", "bleu", "nats"]
    assert card.find("target.own.bleu").base.value == 100 != card.find("target.bleu").base.value
    assert card.find("target.group=a.own.bleu").rows == 10
    assert check(card, "target.own.bleu > base - 1 and slices.own.bleu > base - 1 and general.nats > 0").passed
    with pytest.raises(JudgeError, match=r"two measures would be called 'own\.bleu'"):
        judge(base, files["adapter"], target=files["test"], general=None, keep=False,
              options=options(metrics=(f"{own}:bleu", f"{own.parent}/./cheat.py:bleu")))  # fmt: skip


def test_what_is_said_of_how_rows_are_measured_is_on_the_card(base: Base, files: dict[str, Path]) -> None:
    card = judge(base, files["adapter"], target=files["test"], general=None, keep=False,
                 options=options(metrics=("sari",)))  # fmt: skip
    assert any(note.startswith("sari: the source is the whole prompt") for note in card.notes)
    with pytest.raises(JudgeError, match="exact_calls needs a row that wants a call, and no row does"):
        judge(base, files["adapter"], target=files["test"], general=None, keep=False,
              options=options(metrics=("exact_calls",)))  # fmt: skip


def test_predictions_that_cannot_be_written_are_refused_before_the_work(
    base: Base, files: dict[str, Path], tmp_path: Path
) -> None:
    told: list[Any] = []
    with pytest.raises(StorageError, match=r"predictions\.jsonl\.partial could not be written"):
        judge(base, files["adapter"], target=files["test"], general=None, watch=told.append, options=options(),
              predictions=files["test"] / "predictions.jsonl")  # fmt: skip
    assert told == []


def test_every_prediction_is_written(base: Base, files: dict[str, Path], tmp_path: Path) -> None:
    pairs = [{"good": "a b c", "bad": "c b a"}]
    out = tmp_path / "predictions.jsonl"
    card = judge(base, files["adapter"], target=files["test"], general=TEXT, pairs=pairs, train=files["train"],
                 predictions=out, keep=False, options=options(shots=1))  # fmt: skip
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    target = [line for line in lines if line["set"] == "target"]
    assert [line["side"] for line in target[:3]] == ["base", "adapter", "few-shot"]
    assert len(target) == 60
    first = target[1]
    assert (first["row"], first["prompt"], first["references"], first["answer"]) == (
        1,
        "Say 40",
        ["yes sir"],
        "yes sir",
    )
    assert first["statistics"] == {"exact_match": [100.0, 1.0]}
    assert first["finish_reason"] == "stop"
    for side in ("base", "adapter"):
        mine = [line for line in target if line["side"] == side]
        nats = sum(line["nats"] for line in mine) / sum(line["tokens"] for line in mine)
        assert nats == pytest.approx(getattr(card.find("target.nats"), side).value)
    assert target[2]["shots"] == 1
    assert "nats" not in target[2]
    assert [(line["side"], line["right"], len(line["nats"])) for line in lines if line["set"] == "pairs"] == [
        ("base", 0, 2), ("adapter", 0, 2)
    ]  # fmt: skip


def test_a_fine_tuned_model_is_compared_in_the_same_way(
    make_base: Callable[..., Base], base: Base, rows: Rows, tmp_path: Path
) -> None:
    other = make_base(seed=8)
    other.model.save_pretrained(tmp_path / "model")
    other.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model/postil.json").write_text(json.dumps({"method": "full", "recipe": {"rows": {"format": "raw"}}}))
    card = judge(base, tmp_path / "model", target=rows(0, 12), general=TEXT, options=options())
    first, second = attach(base), attach(make_base(seed=8))
    general = read_general(TEXT, None, None, base, options().general, 0)
    assert card.find("general.nats").base.value == mean_nats(row_losses(first, general.windows, None))
    assert card.find("general.nats").adapter.value == mean_nats(row_losses(second, general.windows, None))
    assert card.find("general.kl").adapter.value == mean_nats(nats_and_kl(second, general.windows, None, first)[1])
    own = json.loads((tmp_path / "model/postil.json").read_text())
    assert own["method"] == "full"
    assert own["card"]["score_card"] == card.model_dump(mode="json")
    assert card.target is not None
    assert card.target.main == "exact_match"
    assert second.base.fingerprint().source.endswith(card.adapter_sha256)


def test_probes_of_adapters_are_not_for_whole_models(base: Base, make_base: Callable[..., Base]) -> None:
    with pytest.raises(JudgeError, match="leave --null and --curve out for a whole model"):
        judge(base, make_base(seed=8), general=TEXT, options=options(null=2))


def test_a_model_with_another_tokenizer_is_refused(
    base: Base, make_base: Callable[..., Base], tokenizer: Any
) -> None:
    other = make_base(seed=8)
    other.tokenizer = copy.deepcopy(tokenizer)
    other.tokenizer.add_tokens(["<new>"])
    with pytest.raises(JudgeError, match="has another tokenizer than the base"):
        judge(base, other, general=TEXT, options=options())


def test_modules_saved_whole_have_no_curve(base: Base, rows: Rows) -> None:
    model = attach(attach(base), LoraConfig(r=2, modules_to_save=("norm",)), name="note")
    torch.nn.init.normal_(model.resident("note").flat, std=0.1)
    card = judge(model, "note", general=TEXT, options=options(curve=(0, 1)))
    assert card.curve == []
    assert "no λ curve: the adapter replaces whole modules, which have no scale" in card.notes


def test_a_measure_that_suits_the_rows_is_taken_and_said(base: Base, taught: Adapter, rows: Rows) -> None:
    card = judge(base, taught, target=rows(40, 52), general=None, keep=False,
                 options=JudgeOptions(metrics=()))  # fmt: skip
    assert card.target is not None
    assert card.target.main == "accuracy"
    assert "measured by accuracy, since every answer is the same label" in card.notes


def test_running_text_is_judged_by_its_loss(base: Base, taught: Adapter) -> None:
    card = judge(base, taught, target=TEXT, general=None, keep=False,
                 options=JudgeOptions(rows={"format": "text"}))  # type: ignore[arg-type]  # fmt: skip
    assert card.target is not None
    assert (card.target.main, list(card.target.measures)) == ("nats", ["nats"])


def test_a_users_own_measure(base: Base, taught: Adapter, rows: Rows, tmp_path: Path) -> None:
    place = tmp_path / "mine.py"
    place.write_text("def letters(answer, row):\n    return float(len(answer))\n")
    card = judge(base, taught, target=rows(40, 52), general=None, keep=False,
                 options=JudgeOptions(metrics=(f"{place}:letters",)))  # fmt: skip
    assert card.find("target.own.letters").adapter.value == len("yes sir")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"general": None}, "there is nothing to judge on: give --target FILE, or general text"),
        ({"options": {"shots": 2}}, "few-shot examples need a target and a training file"),
        ({"options": {"metrics": ("exact_mach",)}}, r"unknown metric 'exact_mach' \(did you mean 'exact_match'\?\)"),
        ({"options": {"slices": ("grup",)}}, r"slices: no row has a column 'grup' \(did you mean 'group'\?\)"),
        ({"options": {"metrics": ("bleu", "bleu")}}, "two measures would be called 'bleu'"),
        (
            {"options": {"metric_options": {"blue": {}}}},
            r"metric_options: 'blue' is none of the metrics asked for \(exact_match\)",
        ),
        ({"options": {"null": 1}}, "judge: null: one random adapter has no spread"),
        ({"options": {"curve": (9.0,)}}, "judge: curve: scales lie from 0"),
        ({"options": {"metric": ("bleu",)}}, r"judge: unknown key 'metric' \(did you mean 'metrics'\?\)"),
        ({"options": {"general": {"widow": 9}}}, r"general: unknown key 'widow' \(did you mean 'window'\?\)"),
        ({"judged": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_a_slip_is_one_sentence(base: Base, taught: Adapter, rows: Rows, given: dict[str, Any], said: str) -> None:
    given = {"judged": taught, "target": rows(40, 44), "general": TEXT} | given
    if given["general"] is None:
        given["target"] = None
    with pytest.raises(PostilError, match=said):
        judge(base, given.pop("judged"), options=options(**given.pop("options", {})), keep=False, **given)
    assert attach(base).residents == {}


def test_an_adapter_of_another_base_is_refused_unless_forced(
    make_base: Callable[..., Base], taught: Adapter, rows: Rows
) -> None:
    other = make_base(seed=9)
    with pytest.raises(AdapterError):
        judge(other, taught, general=TEXT, options=options(), keep=False)
    assert judge(other, taught, general=TEXT, options=options(), keep=False, force=True).find("general.nats")


def test_the_training_file_that_the_recipe_names_is_known(
    base: Base, files: dict[str, Path], taught: Adapter
) -> None:
    told = json.loads((files["adapter"] / "postil.json").read_text())
    sha256 = hashlib.sha256(files["train"].read_bytes()).hexdigest()
    told["card"] |= {"recipe": {"rows": {"format": "raw"}, "data": str(files["train"])}, "data": {"sha256": sha256}}
    (files["adapter"] / "postil.json").write_text(json.dumps(told))

    def judged(**more: Any) -> ScoreCard:
        return judge(base, files["adapter"], target=files["test"], general=None, keep=False, options=options(**more))

    card = judged()
    assert card.target is not None
    assert (card.target.shots, list(card.target.few_shot)) == (4, ["exact_match"])
    assert "nearest_row" in card.target.baselines
    assert any(str(files["train"]) in note and "--shots 0" in note for note in card.notes)
    assert "--train" not in card.command
    without = judged(shots=0)
    assert without.target is not None
    assert (without.target.shots, without.target.few_shot) == (0, {})
    assert "nearest_row" in without.target.baselines
    assert "few_shot" not in without.target.baselines
    assert "--shots 0" in without.command
    files["train"].write_text(files["train"].read_text() + "\n")  # other bytes are other rows
    changed = judged()
    assert changed.target is not None
    assert (changed.target.shots, "nearest_row" in changed.target.baselines) == (0, False)
    with pytest.raises(JudgeError, match="few-shot examples need a target and a training file"):
        judged(shots=2)


def test_what_needs_no_learning_stands_beside_the_adapter(base: Base, files: dict[str, Path]) -> None:
    card = judge(base, files["adapter"], target=files["test"], train=files["train"], general=TEXT, keep=False,
                 options=options(shots=0, null=2))  # fmt: skip
    assert card.target is not None
    assert list(card.target.baselines) == ["most_frequent", "copy_prompt", "copy_last_line", "nearest_row"]
    assert card.find("target").verdict == "better"
    for name, value in (("most_frequent", 100), ("nearest_row", 100), ("copy_prompt", 0)):
        assert card.target.baselines[name]["exact_match"].base.value == value
    assert card.target.verdict == "no evidence"  # every row has one answer, so nothing was to be learned
    assert ScoreCard.parse(card.model_dump(mode="json")) == card
    text = judge(base, files["adapter"], target=TEXT, general=None, keep=False,
                 options=JudgeOptions.parse({"rows": {"format": "text"}}))  # fmt: skip
    assert text.target is not None
    assert text.target.baselines == {}


def test_judging_on_what_was_trained_on_is_noticed(
    base: Base, files: dict[str, Path], taught: Adapter, rows: Rows
) -> None:
    def found(target: Any, general: Any = TEXT, judged: Any = taught) -> Any:
        return judge(base, judged, target=target, general=general, keep=False, options=options()).contamination

    both = found(rows(35, 50))
    assert (both.target, both.target_rows, both.target_answers, both.general, both.general_rows) == (5, 15, 5, 0, 12)
    assert found(files["train"]).target == 40
    assert found(rows(40, 50), None, files["adapter"]).target == 0
    (files["adapter"] / "postil.json").unlink()
    card = judge(base, files["adapter"], target=rows(0, 4), general=None, keep=False, force=True, options=options(
        rows={"format": "raw"}))  # fmt: skip
    assert card.contamination is None
    assert any("does not tell what it was trained on" in note for note in card.notes)


def test_general_documents_that_were_guarded_with_are_counted(base: Base, rows: Rows) -> None:
    model = attach(attach(base), LoraConfig(r=2), name="note")
    documents = [{"text": f"{one['text']} And then {n} more things were told of it."} for n, one in enumerate(TEXT)]
    guarded = load_data(documents, base, DataOptions(format="text"))
    data = load_data(rows(0, 8), base, DataOptions(format="raw"))
    adapter = postil.train(model, data, general=guarded, name="note", steps=1, batch_size=4, warmup=0, guard=9.0)
    assert adapter is not None
    postil.detach(model)
    adapter.card["recipe"] = {"rows": {"format": "raw"}}
    card = judge(base, adapter, general=[*documents[:3], *TEXT], options=options(), keep=False)
    assert card.contamination is not None
    assert (card.contamination.general, card.contamination.general_rows) == (3, 15)
    first = {"window": 32, "tokens": 40}  # of the text that is measured alone
    card = judge(base, adapter, general=[*documents[:3], *TEXT], options=options(general=first), keep=False)
    assert card.contamination is not None
    assert (card.contamination.general, card.contamination.general_rows) == (1, 1)


def test_it_is_public() -> None:
    assert postil.judge is judge_with_chat
    assert postil.ScoreCard is ScoreCard
    assert postil.JudgeOptions is JudgeOptions
    assert NATS.better == "lower"
