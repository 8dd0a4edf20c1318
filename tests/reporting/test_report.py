"""Reports of hand-made runs: whole in themselves, escaped, and telling what the files tell."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from postil.adapter import Adapter
from postil.adapter.peft_files import save_adapter
from postil.errors import JudgeError
from postil.judging.card.model import Comparison, CurvePoint, DataUsed, Estimate, Leakage, Part, ScoreCard
from postil.reporting.card_page import baseline_line, card_html
from postil.reporting.card_words import sentence
from postil.reporting.report import ANSWERS, write_beside, write_report
from postil.reporting.reported import read_reported, run_of

NASTY = "<script>alert('x')</script> & \"quoted\""
SELF_CLOSING = {"meta", "br", "line", "circle", "polyline"}


class Balanced(HTMLParser):
    """Fails where an element is closed that was not opened last."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        if tag not in SELF_CLOSING:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def compared(base: float, adapter: float, unit: str = "points", better: Any = "higher") -> Comparison:
    gap = adapter - base
    verdict: Any = "no evidence" if abs(gap) < 0.1 else "better" if (gap > 0) == (better == "higher") else "worse"

    def near(value: float) -> Estimate:
        return Estimate(value=value, low=value - 0.05, high=value + 0.05)

    return Comparison(
        metric="m", better=better, unit=unit, rows=630, base=near(base), adapter=near(adapter), difference=near(gap),
        verdict=verdict, detectable=0.02,
    )  # fmt: skip


def card(**changes: Any) -> ScoreCard:
    used = DataUsed(name=f"test {NASTY}.jsonl", sha256="<script>/*", rows=630)
    bleu = compared(8.0, 60.7)
    target = Part(
        data=used, main="bleu", measures={"bleu": bleu, "nats": compared(2.0, 0.5, "nats/token", "lower")},
        few_shot={"bleu": Estimate(value=33.3, low=32, high=34)}, shots=5,
        slices={"kind": {NASTY: {"bleu": bleu, "nats": bleu}, "plain": {"bleu": compared(9.0, 8.0), "nats": bleu}}},
    )  # fmt: skip
    general = {"nats": Part(data=used, main="nats", measures={"nats": compared(3.0, 3.28, "nats/token", "lower")})}
    values: dict[str, Any] = {
        "base": {"source": "sha256:00"}, "adapter_sha256": "00", "target": target, "general": general,
        "curve": [
            CurvePoint(scale=s, target=8 + 50 * s, target_nats=2 - s, general_nats=3 + s / 4) for s in (0, 0.5, 1)
        ],
        "leakage": Leakage(rows=200, prefix_tokens=8, matched_tokens=16, adapter=Estimate(value=7.5, low=4, high=12),
                           base=Estimate(value=1.0, low=0, high=3), held_out=Estimate(value=2.5, low=1, high=5)),
        "command": f"postil judge {NASTY}", "notes": [NASTY],
    }  # fmt: skip
    return ScoreCard(**values | changes)


def test_the_best_of_what_needs_no_learning_is_named() -> None:
    part = card().target
    assert part is not None
    assert baseline_line(part) == ""
    nearest = {"bleu": compared(60.69, 60.7), "nats": compared(1, 2)}
    beside = {"copy_prompt": {"bleu": compared(20.0, 60.7)}, "nearest_row": nearest}
    found = part.model_copy(update={"baselines": beside})
    assert baseline_line(found) == (
        "best of the baselines (copy prompt, nearest row): nearest row, bleu 60.7; "
        "the adapter is not shown to be better (+0.0, -0.0 to +0.1)"
    )
    page = "".join(card_html(card(target=found)))
    assert "best of the baselines" in page
    assert "is not better than the best trivial baseline's, nearest_row" in sentence(card(target=found))
    assert "<b>target</b>.bleu</td>" in page
    assert '<span class="verdict">no evidence</span>' in page  # better than the base, and not than every rival
    assert '<span class="verdict">better</span>' not in page.split("<b>target</b>.nats")[0]
    better = part.model_copy(update={"baselines": {"copy_prompt": beside["copy_prompt"]}})
    assert sentence(card(target=better)).startswith("Better on the target: bleu ")
    assert ", and than copy prompt (20.0)" in sentence(card(target=better))
    assert "the adapter is better (+40.7, +40.7 to +40.8)" in baseline_line(better)


def test_the_scope_is_in_the_sentence() -> None:
    assert "scope" not in sentence(card())
    assert sentence(card(scope="task")).endswith(
        "; for its own task alone, so that no damage to chat counts (scope task)."
    )


def made(place: Path, note: Adapter, *, rate: float = 1e-3, judged: ScoreCard | None = None, log: int = 30) -> Path:
    """A run directory: recipe, log, adapter with its card, predictions."""
    place.mkdir()
    recipe = {"base": "tiny", "data": NASTY, "training": {"method": "lora", "learning_rate": rate, "epochs": 1}}
    whole: dict[str, Any] = {"recipe": recipe}
    if judged is not None:
        whole["score_card"] = judged.model_dump(mode="json")
    save_adapter(Adapter(note.config, note.tensors, card=whole), place / "adapter")
    lines = [
        {"step": n, "loss": 3.0 / n, "gradient_norm": 2.0 / n, "learning_rate": rate}
        | ({"valid_loss": 3.5 / n, "general_rise": 0.01 * n} if n % 10 == 0 else {})
        for n in range(1, log + 1)
    ]
    (place / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = []
    for row in range(1, 21):
        for side in ("base", "adapter"):
            told = {"prompt": f"asked {row}", "references": ["wanted", "too"], "answer": f"{side} said {row} {NASTY}"}
            answers.append({"set": "target", "row": row, "side": side, "nats": 1.0, **told})
    answers.append({"set": "pairs", "row": 1, "side": "base", "nats": [1.0, 2.0]})
    (place / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in answers))
    return place


@pytest.fixture
def run(tmp_path: Path, note: Adapter) -> Path:
    return made(tmp_path / "run-a", note, judged=card())


def page_of(*places: Path, **settings: Any) -> str:
    out = places[0].parent / "page.html"
    return write_report(places, out, **settings).read_text(encoding="utf-8")


def test_the_page_is_whole_in_itself(run: Path) -> None:
    text = page_of(run)
    assert not re.search(r"https?:|src=|href=|@import|url\(|<link|<script", text)
    assert 'name="viewport"' in text
    parser = Balanced()
    parser.feed(text)
    assert parser.open == ["html", "body"] or parser.open == []
    assert parser.seen.count("svg") >= 7  # loss, general, norm, two of the curve, two spectra, and intervals
    assert text.count('class="interval"') == 5  # each measure, and each slice's main one


def test_what_was_written_elsewhere_is_escaped(run: Path) -> None:
    text = page_of(run)
    assert "alert(" in text
    assert "<script" not in text


def test_the_score_card_is_told(run: Path) -> None:
    text = page_of(run)
    for said in (
        "Better on the target: bleu 8.0 → 60.7 points", "worse in general: general.nats 3.000 → 3.280 nats",
        "not surely within the +0.05 nats/token that the gate allows", '<td class=n>-10 points</td>',
        "33.3", "+52.7 (", "7.5%", "on rows it never saw 2.5%", "target.bleu by kind (2 values)",
        "0 is the bare base", "postil judge &lt;script&gt;",
    ):  # fmt: skip
        assert said in text
    assert '<span class="verdict worse">worse</span>' in text


def test_curves_spectra_and_answers_are_there(run: Path) -> None:
    text = page_of(run)
    for said in ("training", "held out", "general text, over the base", "step 30", "effective rank by layer",
                 "base said 1 ", "adapter said 1 ", "asked 12", f"The first {ANSWERS} of 20 rows"):  # fmt: skip
        assert said in text
    assert "asked 13" not in text
    assert "effective rank by layer" not in page_of(run, spectra=False)


def test_a_run_that_was_not_judged(tmp_path: Path, note: Adapter) -> None:
    text = page_of(made(tmp_path / "raw", note))
    assert "Not judged yet" in text
    assert "step 30" in text


def test_an_adapter_alone_and_one_inside_a_run(tmp_path: Path, run: Path, note: Adapter) -> None:
    save_adapter(note, tmp_path / "alone")
    alone = read_reported(tmp_path / "alone")
    assert (alone.name, alone.log, alone.card) == ("alone", (), None)
    assert alone.facts["rank"] == "4"
    inner = read_reported(run / "adapter")
    assert inner.name == "run-a"
    assert len(inner.log) == 30
    assert inner.card == card()
    assert run_of(tmp_path / "alone") is None


def test_a_fine_tuned_model_with_and_without_a_card(tmp_path: Path) -> None:
    model = tmp_path / "full/model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (tmp_path / "full/recipe.yaml").write_text("base: tiny\ntraining: {method: full}\n")
    (model / "postil.json").write_text(json.dumps({"recipe": {"base": "tiny", "training": {"method": "full"}}}))
    assert read_reported(tmp_path / "full").card is None
    own = {"recipe": {"base": "tiny"}, "card": {"score_card": card().model_dump(mode="json")}}
    (model / "postil.json").write_text(json.dumps(own))
    found = read_reported(model)
    assert found.card == card()
    assert found.spectra == []


def test_several_runs_are_a_sweep(tmp_path: Path, run: Path, note: Adapter) -> None:
    weak = card(target=None)
    other = made(tmp_path / "run-b", note, rate=2e-4, judged=weak)
    text = page_of(run, other)
    assert "2 runs" in text
    assert "<th>learning rate</th>" in text
    assert "<th>base</th><th>method" not in text  # what is equal is no column
    assert text.count("not judged") == 1
    third = made(tmp_path / "run-c", note, rate=5e-4, judged=card())
    assert "gain against damage" in page_of(run, third)


def test_a_run_of_today_may_still_be_writing(run: Path) -> None:
    log = run / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 31, "lo')
    assert len(read_reported(run).log) == 30


def test_an_answer_may_hold_any_line_separator(run: Path) -> None:
    texts = ["a\u2028b", "c\u0085d", "e\u2029f\x0b\x0c\x1c"]
    lines = [json.dumps({"set": "target", "text": text}, ensure_ascii=False) for text in texts]
    (run / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = read_reported(run, predictions=run / "predictions.jsonl").predictions
    assert [one["text"] for one in found] == texts


def test_write_beside_is_for_runs(tmp_path: Path, run: Path, note: Adapter) -> None:
    assert write_beside(run / "adapter") == run / "report.html"
    assert (run / "report.html").is_file()
    save_adapter(note, tmp_path / "alone")
    assert write_beside(tmp_path / "alone") is None
    assert not (tmp_path / "report.html").exists()


def test_what_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(JudgeError, match="is no run"):
        read_reported(tmp_path / "gone")
    with pytest.raises(JudgeError, match="needs a run or an adapter"):
        write_report([], tmp_path / "x.html")
    with pytest.raises(JudgeError, match="predictions belong to one run"):
        write_report([run, run], tmp_path / "x.html", predictions=run / "predictions.jsonl")
    (run / "predictions.jsonl").write_text('{"set": "target"}\nnonsense\n{"set": "target"}\n')
    with pytest.raises(JudgeError, match=r"predictions\.jsonl:2 is no JSON"):
        read_reported(run)
    (run / "predictions.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(JudgeError, match=r"predictions\.jsonl:1 has no 'set'"):
        read_reported(run)
