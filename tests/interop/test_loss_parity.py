"""Twenty steps of training next to PEFT and torch's AdamW: the same losses, norms, and adapters at the end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from postil.adapter import LoraConfig, attach
from postil.adapter.peft_files import save_adapter
from postil.data import Pack, Sample
from postil.training import TrainOptions, train
from postil.training.step import steps_of

STEPS = 20
EQUAL = 1e-4  # nats per target token
CASES: dict[str, tuple[LoraConfig, dict[str, Any]]] = {
    "llama": (
        LoraConfig(r=4, target_modules=("all-linear", "embed_tokens"), rank_pattern={"up_proj": 7}, use_rslora=True),
        {"schedule": "cosine", "accumulation": 1, "clip": 5.0},
    ),
    "gpt2": (
        LoraConfig(r=4, target_modules="all-linear", bias="lora_only"),
        {"schedule": "linear", "accumulation": 2, "clip": 1.2, "weight_decay": 0.1},
    ),
    "gemma2": (
        LoraConfig(r=8, modules_to_save=("lm_head", "norm"), alpha_pattern={"v_proj": 4}),
        {"schedule": "cosine", "accumulation": 4, "clip": 1.6, "weight_decay": 0.01},
    ),
}


def samples(count: int = 20) -> list[Sample]:
    """Rows of many lengths, about every second token a target."""
    chance = np.random.default_rng(0)
    rows = []
    for number in range(count):
        length = int(chance.integers(4, 19))
        weights = (chance.random(length) < 0.5).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        rows.append(Sample(chance.integers(3, 101, length).astype(np.int32), weights, number + 1))
    return rows


def padded(packs: Sequence[Pack]) -> dict[str, torch.Tensor]:
    """The rows of a step's packs as one right-padded batch with labels."""
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    for pack in packs:
        ids = torch.from_numpy(pack.ids)
        labels = torch.where(torch.from_numpy(pack.weights) > 0, ids, -100)
        rows += zip(ids.split(list(pack.lengths)), labels.split(list(pack.lengths)), strict=True)
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad([ids for ids, _ in rows], batch_first=True),
        "attention_mask": pad([torch.ones_like(ids) for ids, _ in rows], batch_first=True),
        "labels": pad([labels for _, labels in rows], batch_first=True, padding_value=-100),
    }


def factors(options: TrainOptions) -> Iterator[float]:
    """The learning rate of each step over its peak: up to 1 in `warmup` steps, then down to almost 0."""
    for step in range(STEPS):
        if step < options.warmup:
            yield (step + 1) / options.warmup
            continue
        done = (step - options.warmup) / (STEPS - options.warmup)
        yield 1 - done if options.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def train_with_peft(model: Any, data: Sequence[Sample], options: TrainOptions) -> list[tuple[float, float, float]]:
    """(loss, gradient norm, learning rate) of every step on the same rows, transformers' own loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=options.learning_rate, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
    )
    out = []
    for (_, packs), factor in zip(steps_of(data, options, 0, STEPS), factors(options), strict=True):
        batch = padded(packs)
        count = (batch["labels"][:, 1:] != -100).sum()
        loss = model(**batch, num_items_in_batch=count, use_cache=False).loss
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(trained, options.clip))
        optimizer.param_groups[0]["lr"] = options.learning_rate * factor
        optimizer.step()
        optimizer.zero_grad()
        out.append((float(loss.detach()), norm, options.learning_rate * factor))
    return out


@pytest.mark.parametrize("name", CASES)
def test_every_step_has_pefts_loss(name: str, lab: Any, tmp_path: Path) -> None:
    config, settings = CASES[name]
    data = samples()
    options = TrainOptions(
        learning_rate=1e-2, steps=STEPS, batch_size=5, warmup=4, pack_tokens=64, seed=3, **settings
    )
    model = attach(lab.tiny(name), config, seed=1)
    save_adapter(model.export("default"), tmp_path / "start")
    events: list[dict[str, Any]] = []
    trained = train(model, data, options=options, watch=events.append)
    assert trained is not None

    theirs = lab.peft_load(lab.tiny(name), tmp_path / "start", is_trainable=True)
    wanted = train_with_peft(theirs, data, options)
    for event, (loss, norm, rate) in zip(events, wanted, strict=True):
        assert event["loss"] == pytest.approx(loss, rel=0, abs=EQUAL), event["step"]
        assert event["gradient_norm"] == pytest.approx(norm, rel=1e-3), event["step"]
        assert event["learning_rate"] == pytest.approx(rate, rel=1e-9), event["step"]
    losses, norms = [loss for loss, _, _ in wanted], [norm for _, norm, _ in wanted]
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - 0.3  # four steps are an epoch: it learned
    assert min(norms) < options.clip < max(norms)  # some steps were clipped and some were not

    lab.near(lab.plain(model.model), lab.plain(theirs), 1e-4)
    save_adapter(trained, tmp_path / "end")
    here = lab.peft.get_peft_model_state_dict(lab.peft_load(lab.tiny(name), tmp_path / "end"))
    there = lab.peft.get_peft_model_state_dict(theirs)
    assert here.keys() == there.keys()
    for key, tensor in there.items():
        if key.endswith("c_attn.base_layer.bias"):  # a bias of the keys has a gradient of rounding errors alone,
            for part in (here[key], tensor):  # which AdamW makes as large as any other
                part[len(part) // 3 : 2 * len(part) // 3] = 0
        lab.near(here[key], tensor, 1e-4)


def test_a_wrong_divisor_would_be_seen(lab: Any, tmp_path: Path) -> None:
    """The comparison can fail: with a mean over rows in place of target tokens the losses part at once."""
    options = TrainOptions(steps=1, batch_size=5)
    _, packs = next(steps_of(samples(), options, 0, 1))
    events: list[dict[str, Any]] = []
    train(attach(lab.tiny("llama"), LoraConfig()), samples(), options=options, watch=events.append)
    batch = padded(packs)
    base, count = lab.tiny("llama"), len(batch["labels"])
    with torch.no_grad():
        rows = [base(**{key: value[row : row + 1] for key, value in batch.items()}).loss for row in range(count)]
    assert abs(float(sum(rows)) / count - events[0]["loss"]) > 5 * EQUAL
