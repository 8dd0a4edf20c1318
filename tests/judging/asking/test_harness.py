"""lm-eval's tasks: on a base the harness' own transformers model says the same; an adapter stands beside it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from postil.adapter import Adapter, attach, detach
from postil.base import Base, load_base
from postil.errors import JudgeError
from postil.judging.judge import judge as judge_with_chat
from postil.judging.options import HarnessOptions, JudgeOptions

judge = partial(judge_with_chat, chat=None)  # chat: sets/test_chat.py

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # lm-eval's own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

MULTIPLE_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "right",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
    ],
}
LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{question}}",
    "doc_to_target": " {{choices[0]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    ],
}
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
}
GENERATED = {
    "output_type": "generate_until",
    "doc_to_text": "Q: {{question}}\nA:",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 12},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
KINDS = {"choice": MULTIPLE_CHOICE, "word": LAST_WORD, "rolling": ROLLING, "generated": GENERATED}


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., str]:
    """task(kind, …): a task's YAML over a local file of 12 documents, one of them longer than the base's context."""
    rows = [
        {
            "question": f"Which of {n} and {n + 1} is odd?" + " Why?" * n,
            "choices": [str(n), str(n + 1)],
            "right": n % 2,
        }
        for n in range(11)
    ]
    rows.append({"question": "long " * 90, "choices": ["a", "bc"], "right": 1})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(kind: str, **changes: Any) -> str:
        told = {
            "task": f"tiny_{kind}",
            "dataset_path": "json",
            "dataset_kwargs": {
                "data_files": {"test": str(tmp_path / "rows.jsonl")},
                "cache_dir": str(tmp_path / "c"),
            },
            "test_split": "test",
            **KINDS[kind],
            **changes,
        }
        file = tmp_path / f"{kind}.yaml"
        file.write_text(yaml.safe_dump(told))
        return str(file)

    return make


def options(*tasks: str, **more: Any) -> JudgeOptions:
    return JudgeOptions(lm_eval=HarnessOptions(tasks=tasks, **more))


def theirs(base: Base, file: str, limit: int | None = None) -> dict[str, float]:
    """What lm-eval measures with its own wrapper of the same transformers model."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=4, max_length=base.context, device="cpu")
    found = simple_evaluate(
        model,
        tasks=[load_yaml(file, resolve_func=True)],
        bootstrap_iters=0,
        limit=limit,
        task_manager=TaskManager(include_defaults=False),
    )
    (values,) = found["results"].values()
    return {key.partition(",")[0]: value for key, value in values.items() if key.endswith(",none")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_measures_what_lm_evals_own_model_does(
    kind: str, base: Base, note: Adapter, task: Callable[..., str]
) -> None:
    file = task(kind)
    card = judge(base, note, general=None, options=options(file, limit=11), keep=False)
    part = card.general[f"tiny_{kind}"]
    wanted = theirs(base, file, 11)
    assert part.measures.keys() == {key for key in wanted if not key.endswith("_stderr")}
    assert part.data.rows == 11
    for name, measure in part.measures.items():
        scale = 100 if measure.unit == "%" else 1
        assert measure.base.value == pytest.approx(wanted[name] * scale, rel=1e-4)
        assert measure.better == ("lower" if "perplexity" in name or "bits" in name else "higher")


BLIMP = {  # as the harness' own _template_yaml
    "output_type": "multiple_choice",
    "doc_to_text": "",
    "doc_to_target": 0,
    "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
    "num_fewshot": 0,
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
QUESTIONS = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{context}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [
        {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm", "acc_bytes")
    ],
}
SENTENCES = [
    {"sentence_good": f"{first} went {word}.", "sentence_bad": f"{second} went {word}."}
    for first, second in (("They", "Them"), ("Who", "Whom"), ("She", "Her"))
    for word in ("home", "out", "there", "away", "a-b")
]
WORDS = ("one", "two of them", "3", "ÄÖÜ", "none", "all, I think", "so", "why", "größer", "a b c d e")
ASKED = [
    {"context": f"What is {n}?", "choices": [WORDS[n * step % 10] for step in (1, 3, 7, 9)], "answer": n % 4}
    for n in range(40)
    if n % 10 not in (0, 5)
]


@pytest.mark.parametrize(("kind", "rows"), [(BLIMP, SENTENCES), (QUESTIONS, ASKED)], ids=["pairs", "choices"])
def test_pairs_and_choices_are_scored_as_lm_eval_does(
    kind: dict[str, Any], rows: list[dict[str, Any]], base: Base, tmp_path: Path
) -> None:
    from postil.judging.options import GeneralOptions
    from postil.judging.sets.general import measure, read_general

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "task.yaml"
    files = {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "c")}
    told = {"task": "tiny", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **kind}
    file.write_text(yaml.safe_dump(told))
    wanted = theirs(base, str(file))
    pairs, choices = (rows, None) if kind is BLIMP else (None, rows)
    model = attach(base)
    (found,) = measure(read_general(None, choices, pairs, base, GeneralOptions(), 0), model, None).parts.values()
    detach(model)
    names = {"accuracy": "acc", "accuracy_per_character": "acc_norm", "accuracy_per_byte": "acc_bytes"}
    shared = {name: stats for name, stats in found.items() if names.get(name) in wanted}
    assert len(shared) == len(kind["metric_list"])
    for name, stats in shared.items():
        assert stats[:, 0].mean() == pytest.approx(100 * wanted[names[name]]), name
    assert len({stats[:, 0].mean() for stats in shared.values()} - {0.0, 100.0}) > (0 if kind is BLIMP else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_longer_than_the_context_is_cut_from_its_front(
    kind: str, base: Base, note: Adapter, task: Callable[..., str]
) -> None:
    card = judge(base, note, general=None, options=options(task(kind)), keep=False)
    assert card.general[f"tiny_{kind}"].data.rows == 12


def test_adapter_and_base_differ_and_the_gate_reads_it(base: Base, note: Adapter, task: Callable[..., str]) -> None:
    from postil.judging.gate.gate import check

    card = judge(base, note, general=None, options=options(task("word"), limit=8), keep=False)
    part = card.general["tiny_word"]
    assert part.main == "perplexity"
    assert part.data.rows == 8
    measure = card.find("general.tiny_word")
    assert measure.base.value != measure.adapter.value
    worse = measure.adapter.value > measure.base.value
    assert check(card, "general.tiny_word < base").passed is not worse
    assert "lm_eval.tasks" in card.command
    assert "lm_eval.limit=8" in card.command


def test_an_adapters_values_are_those_of_its_merged_model(
    base: Base, make_base: Callable[..., Base], note: Adapter, task: Callable[..., str]
) -> None:
    file = task("choice")
    card = judge(base, note, general=None, options=options(file), keep=False)
    merged = make_base()
    for path in note.modules:
        a, b = (note.tensors[f"{path}.lora_{one}.weight"] for one in "AB")
        merged.model.get_submodule(path).weight.data += note.config.alpha / note.config.r * b @ a
    wanted = theirs(merged, file)
    for name, measure in card.general["tiny_choice"].measures.items():
        assert measure.adapter.value == pytest.approx(100 * wanted[name])


def test_token_scores_are_the_row_losses_and_greedy_is_the_argmax(base: Base, note: Adapter) -> None:
    from postil.data import Sample
    from postil.judging.asking.likelihoods import row_losses, token_scores

    random = np.random.default_rng(0)
    samples = []
    for number, length in enumerate((2, 9, 40, 1 + 200), 1):
        weights = np.zeros(length, dtype=np.float32)
        weights[-max(length // 3, 1) :] = 1
        samples.append(Sample(random.integers(0, 256, length, dtype=np.int32), weights, number))
    model = attach(attach(base), note, name="note")
    model.activate()
    for adapter in (None, "note"):
        found = token_scores(model, samples, adapter)
        assert [one for one, _ in found] == pytest.approx([one for one, _ in row_losses(model, samples, adapter)])
    answer = samples[1].ids.copy()
    for place in range(6, 9):  # a continuation that is greedy
        answer[place] = int(base.model(torch_row(answer[:place])).logits[0, -1].argmax())
    weights = np.zeros(9, dtype=np.float32)
    weights[6:] = 1
    model.activate()
    ((_, greedy),) = token_scores(model, [Sample(answer, weights, 1)], None)
    assert greedy
    answer[8] = (answer[8] + 1) % 256
    ((_, greedy),) = token_scores(model, [Sample(answer, weights, 1)], None)
    assert not greedy
    assert token_scores(model, [], None) == []
    detach(model)


def torch_row(ids: Any) -> Any:
    import torch

    return torch.from_numpy(np.asarray(ids, dtype=np.int64))[None]


def test_base_and_adapter_see_the_same_examples(base: Base, note: Adapter, task: Callable[..., str]) -> None:
    tensors = {key: value * 0 if "lora_B" in key else value for key, value in note.tensors.items()}
    nothing = replace(note, tensors=tensors)
    file = task("word", fewshot_split="test")
    seen = set()
    for more in ({}, {"shots": 2}, {"chat": True}):
        part = judge(base, nothing, general=None, options=options(file, limit=6, **more), keep=False).general[
            "tiny_word"
        ]
        measure = part.measures["perplexity"]
        assert measure.adapter.value == pytest.approx(measure.base.value, rel=1e-5)
        seen.add((round(measure.base.value, 3), part.data.sha256))
    assert len(seen) == 3


def test_an_adapter_that_overflows_is_no_perfect_one(base: Base, note: Adapter, task: Callable[..., str]) -> None:
    tensors = {key: value * 1e30 for key, value in note.tensors.items()}
    with pytest.raises(JudgeError):
        judge(base, replace(note, tensors=tensors), general=None, options=options(task("word")), keep=False)


def test_the_base_is_asked_once_for_all_adapters(
    make_base: Callable[..., Base], note: Adapter, task: Callable[..., str], tmp_path: Path
) -> None:
    made = make_base()
    made.model.save_pretrained(tmp_path / "base")
    made.tokenizer.save_pretrained(tmp_path / "base")
    opposite = {key: -value if "lora_B" in key else value for key, value in note.tensors.items()}
    other = replace(note, tensors=opposite, card={})
    files = [task("choice"), task("generated"), task("rolling")]

    def asked(adapter: Adapter, **more: Any) -> tuple[Any, set[str]]:
        phases: set[str] = set()
        base, told = load_base(tmp_path / "base"), options(*files, limit=8, **more)
        card = judge(base, adapter, general=None, options=told, watch=lambda e: phases.add(e["phase"]), force=True)
        return card.general, {phase for phase in phases if phase.startswith("lm-eval")}

    first, phases = asked(note)
    assert phases == {"lm-eval of the base", "lm-eval of what is judged"}
    second, phases = asked(other)
    assert phases == {"lm-eval of what is judged"}
    for name, part in first.items():
        for measure, one in part.measures.items():
            assert second[name].measures[measure].base == one.base
    assert asked(note) == (first, set())
    assert "lm-eval of the base" in asked(note, shots=0, chat=True)[1]


def test_whatever_a_tasks_own_code_raises_is_one_sentence(
    base: Base, note: Adapter, task: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text("class Odd(Exception):\n    pass\n\n\ndef target(doc):\n    raise Odd('no')\n")
    file = Path(task("word"))
    file.write_text(
        file.read_text().replace("doc_to_target: ' {{choices[0]}}'", "doc_to_target: !function own.target")
    )
    with pytest.raises(JudgeError, match=r"lm-eval could not run .*: no"):
        judge(base, note, general=None, options=options(str(file)), keep=False)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("arc_esay", "no task 'arc_esay'.*arc_easy"),
        ("nowhere.yaml", "no file nowhere.yaml"),
    ],
)
def test_a_slip_is_one_sentence(name: str, said: str, base: Base, note: Adapter) -> None:
    with pytest.raises(JudgeError, match=said):
        judge(base, note, general=None, options=options(name), keep=False)


def test_a_task_that_cannot_be_opened_is_named(base: Base, note: Adapter, task: Callable[..., str]) -> None:
    file = task("choice", dataset_kwargs={"data_files": {"test": "/nowhere/rows.jsonl"}})
    with pytest.raises(JudgeError, match=r"lm-eval could not run .*choice.yaml"):
        judge(base, note, general=None, options=options(file), keep=False)


def test_without_the_extra_the_mend_is_told(base: Base, note: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [one for one in sys.modules if one.split(".")[0] == "lm_eval"] + ["postil.judging.asking.harness"]:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(JudgeError, match=r"pip install 'postil\[lm-eval\]'"):
        judge(base, note, general=None, options=options("arc_easy"), keep=False)


@pytest.mark.parametrize("names", [("chat",), ("nats",), ("a.b", "a_b")])
def test_a_task_takes_no_other_parts_place(
    names: tuple[str, ...], base: Base, note: Adapter, task: Callable[..., str]
) -> None:
    kinds = ("choice", "word")
    files = [task(kind, task=name) for kind, name in zip(kinds, names, strict=False)]
    with pytest.raises(JudgeError, match=rf"the task '{names[-1]}' would stand in the card as general\."):
        judge(base, note, general=None, options=options(*files), keep=False)
