"""The same on real weights: SmolLM2-135M in float32, adapters both ways, merged exports, a whole life of a base."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from postil.adapter import AdaptedModel, LoraConfig, attach, detach
from postil.adapter.export import export_merged
from postil.adapter.merge import merge, unmerge
from postil.adapter.peft_files import load_adapter, save_adapter
from postil.base import Base, live_digest, load_base
from postil.data import Sample
from postil.engine import Answer, Engine, Request
from postil.training import train

pytestmark = pytest.mark.base

EQUAL = 1e-5  # absolute, on logits up to 36, for a plain pass; of the largest logit for the packed one
TEXT = "The margin of an old book holds more than its text: a date, a doubt, 3 + 4 = 7, and a name."
CONFIG = LoraConfig(
    r=8, target_modules=("attention", "down_proj"), rank_pattern={r"layers\.3\.self_attn\.q_proj": 4},
    alpha_pattern={"v_proj": 4}, use_rslora=True, modules_to_save=("model.norm",),
)  # fmt: skip
PEFT_CONFIG = LoraConfig(
    r=4, target_modules=r".*layers\.\d*[02468]\.(self_attn\.[qkvo]|mlp\.up)_proj", alpha_pattern={"q_proj": 9}
)
CLOSE = 1e-4  # a smaller margin between two tokens is no defined greedy choice
NEW_TOKENS = 10


@pytest.fixture(scope="module")
def base() -> Iterator[Base]:
    """The base, loaded once; every test leaves it bit for bit as it was."""
    base = load_base("smollm2-135m-instruct", dtype="float32")
    before = live_digest(base.model)
    yield base
    assert live_digest(base.model) == before


@pytest.fixture
def text(base: Base) -> torch.Tensor:
    """Token ids [tokens] of one English line."""
    return torch.tensor(base.tokenizer(TEXT)["input_ids"])


def check(lab: Any, found: torch.Tensor, wanted: torch.Tensor) -> None:
    lab.near(found, wanted, EQUAL * float(wanted.abs().max()))


def test_our_adapter_in_peft(base: Base, text: torch.Tensor, lab: Any, tmp_path: Path) -> None:
    one = [len(text)]
    bare = lab.plain(base.model, text, one)
    model = attach(base, CONFIG)
    lab.scramble(model, size=0.01)
    wanted = lab.plain(base.model, text, one)
    assert (wanted - bare).abs().max() > 1
    check(lab, lab.packed(model, text, one), wanted)
    save_adapter(model.export("default"), tmp_path / "a")
    detach(model)
    assert torch.equal(lab.plain(base.model, text, one), bare)
    theirs = lab.peft_load(copy.deepcopy(base.model), tmp_path / "a")
    lab.near(lab.plain(theirs, text, one), wanted, EQUAL)


def test_pefts_adapter_here(base: Base, text: torch.Tensor, lab: Any, tmp_path: Path) -> None:
    one = [len(text)]
    bare = lab.plain(base.model, text, one)
    theirs = lab.peft_model(copy.deepcopy(base.model), PEFT_CONFIG, size=0.02)
    wanted = lab.plain(theirs, text, one)
    assert (wanted - bare).abs().max() > 1
    theirs.save_pretrained(str(tmp_path / "a"))
    del theirs
    model = attach(base, load_adapter(tmp_path / "a"))
    lab.near(lab.plain(base.model, text, one), wanted, EQUAL)
    check(lab, lab.packed(model, text, one), wanted)
    detach(model)


def test_a_merged_export_is_the_adapted_model(base: Base, text: torch.Tensor, lab: Any, tmp_path: Path) -> None:
    one = [len(text)]
    model = attach(base, CONFIG)
    lab.scramble(model, size=0.01)
    wanted = lab.plain(base.model, text, one)
    export_merged(model, "default", tmp_path / "whole")
    detach(model)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not any(info.values()), info
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    lab.near(lab.plain(plain.eval(), text, one), wanted, 1e-4)


def test_a_whole_life_leaves_no_trace(base: Base, text: torch.Tensor) -> None:
    """Attach, two steps of training, merge, unmerge, detach: the live tensors are bit for bit as before."""
    before, source = live_digest(base.model), base.fingerprint(verify=True)
    rows = [row.numpy().astype(np.int32) for row in text.split(9)]
    samples = [Sample(ids, np.array([0.0] + [1.0] * (len(ids) - 1), np.float32), n) for n, ids in enumerate(rows, 1)]
    model = attach(base, LoraConfig(r=4))
    events: list[dict[str, Any]] = []
    train(model, samples, steps=2, batch_size=len(samples), learning_rate=1e-3, warmup=0, watch=events.append)
    assert [event["step"] for event in events] == [1, 2]
    assert events[1]["loss"] < events[0]["loss"]
    assert live_digest(base.model) == before
    drift = merge(model, "default")
    assert 0 < drift.max_logit < 1e-3
    assert live_digest(base.model) != before
    unmerge(model)
    assert live_digest(base.model) == before
    detach(model)
    assert live_digest(base.model) == before
    assert base.fingerprint(verify=True) == source


def merged_greedy(model: AdaptedModel, request: Request, ids: Sequence[int]) -> list[int]:
    """The new tokens by plain transformers, its own cache and loop, on the model as it stands."""
    prompt = torch.tensor([list(ids)])
    out = model.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.max_new_tokens, do_sample=False
    )
    return [int(token) for token in out[0, prompt.shape[1] :]]


def parted(answer: Answer, wanted: Sequence[int], ends: frozenset[int]) -> bool:
    """Whether the answer leaves the wanted one, which is allowed only where two tokens are as good as equal."""
    hoped = [token for token in wanted if token not in ends]
    if list(answer.ids) == hoped:
        return False
    place = next((n for n, (a, b) in enumerate(zip(answer.ids, hoped, strict=False)) if a != b), len(answer.ids))
    assert answer.margins[min(place, len(answer.margins) - 1)] < CLOSE, (answer.ids, hoped)
    return True


def test_a_mixed_batch_equals_solo_runs_with_merged_weights(base: Base, lab: Any) -> None:
    model = attach(base, LoraConfig(r=4), name="one")
    attach(model, LoraConfig(r=8, target_modules="all-linear"), name="two")
    for seed, (name, size) in enumerate((("one", 0.05), ("two", 0.02))):
        lab.scramble(model, name, seed, size)
    prompts, users = ("Once upon a time", "To bake a good loaf of bread, first"), ("one", None, "two")
    requests = [
        Request(prompt=prompts[n % 2], raw=True, adapter=users[n % 3], max_new_tokens=NEW_TOKENS + n)
        for n in range(6)
    ]
    model.activate()  # plain calls are the base alone; the engine goes by each row's own name
    engine = Engine(model)
    answers = engine.run(requests)
    assert len({answer.ids[:NEW_TOKENS] for answer in answers}) == 6  # each adapter speaks for itself
    close = 0
    for user in users:
        if user:
            merge(model, user)
        for request, answer in zip(requests, answers, strict=True):
            if request.adapter == user:
                ids = base.tokenizer(request.prompt)["input_ids"]
                close += parted(answer, merged_greedy(model, request, ids), engine.eos)
        if user:
            unmerge(model)
    engine.close()
    detach(model)
    assert close <= 1
