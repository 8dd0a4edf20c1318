"""The card's rows: digests of what was trained on, held out and guarded with, from Python and from a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from postil.adapter import LoraConfig, attach, detach
from postil.adapter.peft_files import load_adapter, save_adapter
from postil.adapter.shrink import shrink
from postil.base import Base, load_base
from postil.data import DataOptions, Dataset, load_data
from postil.data.digests import DigestSet, row_digests
from postil.data.formats import Pair, Text
from postil.errors import AdapterError
from postil.training import train
from postil.training.recipe import Recipe, prepare

RAW = DataOptions(format="raw")
Rows = list[dict[str, Any]]


def pairs(first: int, end: int) -> Rows:
    return [{"prompt": f"Say {n // 2}", "completion": f"yes {n}"} for n in range(first, end)]


def documents(count: int) -> Rows:
    return [{"text": " ".join(f"word{place}of{n}" for place in range(10))} for n in range(count)]


def prompts(told: dict[str, Any], kind: str = "trained") -> set[int]:
    return {int(one) for one in DigestSet.parse(told[kind]["prompts"]).kept}


def digests(rows: Rows) -> set[int]:
    return {row_digests(Pair(row["prompt"], row["completion"], "")).prompts[0] for row in rows}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny Llama of context 256 on which every byte is a token."""
    found = tmp_path_factory.mktemp("base")
    inner = Tokenizer(
        models.BPE({letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(found)
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(found)
    return found


@pytest.fixture
def base(place: Path) -> Base:
    return load_base(place)


def loaded(rows: Rows, base: Base) -> Dataset:
    return load_data(rows, base, RAW)


QUICK: dict[str, Any] = {"steps": 1, "batch_size": 4, "warmup": 0}


def test_a_training_from_python_tells_its_rows_and_those_before(base: Base) -> None:
    model = attach(base, LoraConfig(r=2))
    adapter = train(model, loaded(pairs(0, 8), base), valid=loaded(pairs(8, 12), base), **QUICK)
    assert adapter is not None
    told = adapter.card["seen"]
    assert json.loads(json.dumps(told)) == told
    assert told["complete"] is True
    assert prompts(told) == digests(pairs(0, 8))
    assert prompts(told, "held_out") == digests(pairs(8, 12))
    assert prompts(told, "general") == set()
    assert len(DigestSet.parse(told["trained"]["answers"]).kept) == 8
    again = train(model, loaded(pairs(20, 24), base), **QUICK)
    assert again is not None
    assert prompts(again.card["seen"]) == digests([*pairs(0, 8), *pairs(20, 24)])
    assert prompts(again.card["seen"], "held_out") == digests(pairs(8, 12))
    assert again.card["seen"]["complete"] is True
    detach(model)


def test_rows_that_came_as_samples_are_not_known(base: Base) -> None:
    model = attach(base, LoraConfig(r=2))
    data = loaded(pairs(0, 8), base)
    adapter = train(model, data.samples, **QUICK)
    assert adapter is not None
    assert (adapter.card["seen"]["trained"], adapter.card["seen"]["complete"]) == (None, False)
    onward = train(model, data, **QUICK)  # what it went on from is not known
    assert onward is not None
    assert onward.card["seen"]["complete"] is False
    assert prompts(onward.card["seen"]) == digests(pairs(0, 8))
    detach(model)


def test_an_adapter_that_tells_nothing_leaves_the_next_one_incomplete(base: Base, tmp_path: Path) -> None:
    model = attach(base, LoraConfig(r=2))
    adapter = train(model, loaded(pairs(0, 8), base), **QUICK)
    assert adapter is not None
    detach(model)
    place = save_adapter(adapter, tmp_path / "adapter")
    (place / "postil.json").unlink()
    model = attach(attach(base), load_adapter(place), name="default")
    onward = train(model, loaded(pairs(0, 8), base), **QUICK)
    assert onward is not None
    assert onward.card["seen"]["complete"] is False
    detach(model)
    assert shrink(adapter, rank=1).adapter.card["seen"] == adapter.card["seen"]


@pytest.mark.parametrize("seen", ["all", 3, [1], {"trained": {"prompts": "x"}}, {"held_out": {"answers": [1]}}])
def test_a_card_that_cannot_be_read_stops_the_training_before_it_begins(place: Path, seen: object) -> None:
    base = load_base(place)
    model = attach(base, LoraConfig(r=2))
    model.resident("default").card["seen"] = seen
    steps: list[dict[str, Any]] = []
    with pytest.raises(
        AdapterError, match=r"the card of 'default' .* cannot be read .*: take 'seen' out of the card"
    ):
        train(model, load_data(pairs(0, 8), base, RAW), steps=1, watch=steps.append)
    assert not steps
    assert model.resident("default").card["seen"] == seen


@pytest.fixture
def recipe(place: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """recipe(**keys): over forty rows, two of every prompt, with general documents."""
    for name, rows in (("rows", pairs(0, 40)), ("general", documents(6)), ("valid", pairs(60, 64))):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fixed = {"base": str(place), "data": str(tmp_path / "rows.jsonl"), "out": str(tmp_path / "run"),
             "rows": {"format": "raw"}}  # fmt: skip

    def make(**keys: Any) -> Recipe:
        training = {"warmup": 0, "steps": 1, "batch_size": 8} | keys.pop("training", {})
        recipe: Recipe = Recipe.parse(fixed | {"training": training} | keys)
        return recipe

    return make


def test_a_recipe_tells_its_rows_the_held_out_ones_and_the_guarded(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    job = prepare(recipe(valid_share=0.2, general=str(tmp_path / "general.jsonl"),
                         training={"guard": 9.0, "general_tokens": 32}))  # fmt: skip
    job.run()
    told = load_adapter(tmp_path / "run/adapter").card["seen"]
    assert told["complete"] is True
    assert len(prompts(told)) == 16
    assert len(prompts(told, "held_out")) == 4
    assert prompts(told).isdisjoint(prompts(told, "held_out"))  # no question lies on both sides
    assert prompts(told) | prompts(told, "held_out") == digests(pairs(0, 40))
    texts = {row_digests(Text(row["text"])).answers[0] for row in documents(6)}
    assert {int(one) for one in DigestSet.parse(told["general"]["answers"]).kept} == texts


def test_rows_left_out_are_not_trained_on_and_what_it_goes_on_from_is(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(file.read_text() + json.dumps({"prompt": "long " * 400, "completion": "x"}) + "\n")
    prepare(recipe(valid=str(tmp_path / "valid.jsonl"))).run()
    told = load_adapter(tmp_path / "run/adapter").card["seen"]
    assert prompts(told) == digests(pairs(0, 40))
    assert prompts(told, "held_out") == digests(pairs(60, 64))
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs(70, 80)))
    prepare(recipe(out=str(tmp_path / "more"), from_adapter=str(tmp_path / "run/adapter"), valid_share=0)).run()
    onward = load_adapter(tmp_path / "more/adapter").card["seen"]
    assert prompts(onward) == digests([*pairs(0, 40), *pairs(70, 80)])
    assert prompts(onward, "held_out") == digests(pairs(60, 64))
    assert onward["complete"] is True


def test_a_model_trained_whole_tells_its_rows_too(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    prepare(recipe(valid_share=0, training={"method": "full"})).run()
    own = json.loads((tmp_path / "run/model/postil.json").read_text())
    assert prompts(own["seen"]) == digests(pairs(0, 40))
    assert (own["method"], own["recipe"]["rows"]["format"]) == ("full", "raw")
    assert own["data"]["samples"] == 40
    assert own["result"]["steps"] == 1
