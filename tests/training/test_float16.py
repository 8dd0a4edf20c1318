"""Training in float16: the gradient of thousands of target tokens is float32's, and an overflow is scaled away."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from postil.adapter import AdaptedModel, LoraConfig, attach
from postil.base import base_from_model
from postil.base.quantise import quantise_model
from postil.data import Sample, pack
from postil.errors import RunError
from postil.training import TrainOptions, train
from postil.training.holding import BaseStates, kl_gradients
from postil.training.optimizer import AdapterWeights, FullWeights
from postil.training.step import _risen, gradients

TARGETS = 4096
METHODS = ("lora", "qlora", "full")


def rows(count: int = TARGETS // 64, length: int = 65) -> list[Sample]:
    random = np.random.default_rng(0)
    weights = np.ones(length, dtype=np.float32)
    weights[0] = 0
    return [Sample(random.integers(0, 4000, length).astype(np.int32), weights, row + 1) for row in range(count)]


def model_in(dtype: torch.dtype, method: str = "lora", first: float = 1.0) -> AdaptedModel:
    """The same model, its weights rounded to float16, in either dtype; first: what every A is multiplied by."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=4096, tie_word_embeddings=True, max_position_embeddings=128,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).half().to(dtype).eval()
    if method == "qlora":
        quantise_model(model)
    adapted = attach(base_from_model(model))
    if method != "full":
        attach(adapted, LoraConfig(r=4, target_modules="all-linear"), seed=1)
        generator = torch.Generator().manual_seed(3)
        for key, leaf in adapted.resident("default").leaves.items():
            drawn = torch.randn(leaf.shape, generator=generator) * 0.02
            leaf.mul_(first) if key.endswith(".a") else leaf.copy_(drawn * (first == 1.0))
    return adapted


Step = Callable[[AdaptedModel, Any, Any, TrainOptions], float]


def learning(model: AdaptedModel, weights: Any, resident: Any, options: TrainOptions) -> float:
    return gradients(model, weights, resident, [pack(rows())], options, 1)[0]


def holding(model: AdaptedModel, weights: Any, resident: Any, options: TrainOptions) -> float:
    weights.grad.fill_(1e-3)  # what the rows' own loss left there
    bare = weights.origin()
    if resident is None:
        weights.flat.add_(torch.randn(weights.flat.shape, generator=torch.Generator().manual_seed(2)), alpha=1e-2)
        weights.publish()
    mean = kl_gradients(model, weights, resident, {"prose": rows()}, options, 1, BaseStates(bare))["prose"]
    weights.grad.sub_(1e-3)
    return mean


@pytest.mark.parametrize("step", [learning, holding])
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_a_large_step_is_that_of_float32(method: str, step: Step) -> None:
    options = TrainOptions(method=method, kl_weight=0.5)
    found = []
    for dtype in (torch.float32, torch.float16):
        model = model_in(dtype, method)
        resident = model.resident("default") if method != "full" else None
        weights = AdapterWeights.of(resident) if resident is not None else FullWeights.of(model.model)
        loss = step(model, weights, resident, options)
        found.append((loss, weights.grad.double()))
    (loss, wanted), (rounded, got) = found
    assert rounded == pytest.approx(loss, rel=5e-3)
    error = float((got - wanted).norm() / wanted.norm())
    assert error < 1e-2, f"{error:.4f}"


LARGE = 3e3  # what makes h = x A^T so large that dy^T h leaves float16's range, and its forward pass not


def one_step(model: AdaptedModel, out: Path | None = None, **settings: Any) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    options = {"steps": 1, "batch_size": 64, "warmup": 0, "learning_rate": 1e-6} | settings
    train(model, rows(), out=out, watch=events.append, **options)
    return events


def test_gradients_beyond_float16_are_scaled_down_and_learned(tmp_path: Path) -> None:
    (wanted,) = one_step(model_in(torch.float32, first=LARGE))
    model = model_in(torch.float16, first=LARGE)
    resident = model.resident("default")
    weights = AdapterWeights.of(resident)
    gradients(model, weights, resident, [pack(rows())], TrainOptions(), 1)
    assert not weights.grad.isfinite().all()  # as the sum is
    resident.train(False)
    (got,) = one_step(model, tmp_path)
    assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
    assert got["gradient_norm"] == pytest.approx(wanted["gradient_norm"], rel=1e-2)
    manifest = json.loads((tmp_path / "checkpoints/step-00000001/manifest.json").read_text())
    assert 1e-7 < manifest["scale"] < 1


def test_a_run_whose_sums_are_scaled_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["step"] == 2:
            raise ValueError("killed")

    settings = {"steps": 4, "batch_size": 16, "checkpoint_every": 1, "learning_rate": 1e-6}
    train(whole := model_in(torch.float16, first=LARGE), rows(), **settings)
    with pytest.raises(ValueError, match="killed"):
        train(model_in(torch.float16, first=LARGE), rows(), out=tmp_path, watch=stop, **settings)
    train(again := model_in(torch.float16, first=LARGE), rows(), out=tmp_path, **settings)
    assert torch.equal(again.resident("default").flat, whole.resident("default").flat)


def test_a_gradient_that_no_scale_makes_finite_is_an_error() -> None:
    model = model_in(torch.float16)
    resident = model.resident("default")
    before = resident.flat.clone()
    next(iter(resident.leaves.values())).requires_grad_(True).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(RunError, match=r"norm (inf|nan) at step 1; .* open the base in bfloat16 or float32"):
        train(model, rows(4), steps=1)
    assert torch.equal(resident.flat, before)


def test_a_scale_rises_again() -> None:
    scales = [1 / 256]
    for step in range(1, 301):
        scales.append(_risen(scales[-1], step))
    assert [scales[step] for step in (99, 100, 199, 200, 300)] == [1 / 256, 1 / 16, 1 / 16, 1, 1]
