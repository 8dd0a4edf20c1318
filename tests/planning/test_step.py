"""The traced step against a real one: the same ledger over real tensors of the real training loop."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, MistralForCausalLM

from postil.adapter import LoraConfig, attach
from postil.base.quantise import quantise_model
from postil.data import Sample
from postil.judging.asking.likelihoods import row_losses
from postil.kernels.attention.op import _small_mask
from postil.kernels.dense import op
from postil.planning.ledger import HEAP_FACTOR, PROCESS, SLACK, Ledger, Recorder
from postil.planning.step import traced_step
from postil.training import TrainOptions
from postil.training.loop import run

CONFIG: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 256,
}  # fmt: skip
LENGTHS = (200, 40, 100)


def real_peak(method: str, checkpointing: bool) -> int:
    """The most bytes of tensors alive in one step of the real loop beyond the base and what it trains with."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG), dtype=torch.float32).eval()
    if method == "qlora":
        quantise_model(model)
    adapted = attach(model)
    if method != "full":
        attach(adapted, LoraConfig(target_modules="all-linear"))
    samples = []
    for row, length in enumerate(LENGTHS):
        weights = np.ones(length, dtype=np.float32)
        weights[0] = 0
        samples.append(Sample(np.full(length, 7 + row, dtype=np.int32), weights, row + 1))
    ledger = Ledger(heap=False)
    before = [*model.parameters(), *model.buffers(), *(resident.flat for resident in adapted.residents.values())]
    for tensor in before:
        ledger.born(tensor)
    options = TrainOptions(method=method, steps=1, batch_size=3, gradient_checkpointing=checkpointing)
    with Recorder(ledger, "cpu"), ledger.during("step"):
        run(adapted, samples, [], out=None, name="default", options=options)
    return sum(size for part, size in ledger.peaks["step"].items() if part != "weights")


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trace_is_what_really_happens(method: str, checkpointing: bool) -> None:
    traced = traced_step(
        LlamaConfig(**CONFIG), torch.float32, method=method, lora=LoraConfig(target_modules="all-linear"),
        lengths=LENGTHS, targets=sum(LENGTHS) - 3, device="cpu", checkpointing=checkpointing, kept=False,
        general=False,
    )  # fmt: skip
    own = {"weights", SLACK} | ({"masters"} if method != "full" else set())  # the adapter was there before the step
    peak = max(sum(size for part, size in parts.items() if part not in own) for parts in traced.values())
    assert peak == pytest.approx(real_peak(method, checkpointing), rel=0.03)


def test_nothing_of_a_trace_stays_in_the_code_books() -> None:
    from postil.kernels.nf4.codes import nf4_pairs

    traced_step(
        LlamaConfig(**CONFIG), torch.float32, method="qlora", lora=LoraConfig(), lengths=(4,), targets=3,
        device="cpu", checkpointing=False, kept=False, general=False,
    )  # fmt: skip
    assert type(nf4_pairs(torch.device("cpu"))) is torch.Tensor


def test_nothing_of_a_trace_stays_in_the_attention_masks() -> None:
    """A window makes masks, of which small ones are kept for later calls."""
    config = MistralConfig(**CONFIG | {"sliding_window": 5, "num_hidden_layers": 2})
    torch.manual_seed(0)
    model = attach(MistralForCausalLM(config).eval())
    row = Sample(np.arange(3, 24, dtype=np.int32), np.repeat([0.0, 1.0], [1, 20]).astype(np.float32), 1)
    _small_mask.cache_clear()
    wanted = row_losses(model, [row], None)
    _small_mask.cache_clear()
    for device in ("cpu", "cuda"):
        traced_step(
            config, torch.float32, method="lora", lora=LoraConfig(), lengths=(21,), targets=20, device=device,
            checkpointing=False, kept=False, general=False,
        )  # fmt: skip
    assert row_losses(model, [row], None) == wanted


def test_nothing_of_a_trace_stays_in_the_memory_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a processor has no 16-bit products; and a trace is the same whether a product was made before it."""
    monkeypatch.setattr(op, "multiplies", lambda dtype: dtype != torch.bfloat16)
    monkeypatch.setattr(op, "_kept", threading.local())

    def trace() -> dict[str, Any]:
        return traced_step(
            LlamaConfig(**CONFIG), torch.bfloat16, method="lora", lora=LoraConfig(), lengths=(40,), targets=39,
            device="cpu", checkpointing=False, kept=False, general=False,
        )  # fmt: skip

    cold = trace()
    assert not vars(op._kept)
    x, w = torch.randn(40, 24).bfloat16(), torch.randn(300, 24).bfloat16()
    torch.testing.assert_close(op.matmul(x, w), x @ w.T)
    kept = dict(vars(op._kept))
    assert kept
    assert trace() == cold
    assert vars(op._kept) == kept


def test_the_seed_is_left_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    traced_step(
        LlamaConfig(**CONFIG), torch.float32, method="lora", lora=LoraConfig(), lengths=(4,), targets=3, device="cpu",
        checkpointing=False, kept=False, general=False,
    )  # fmt: skip
    assert torch.equal(torch.rand(3), wanted)


def test_a_storage_counts_once_until_its_last_view_dies() -> None:
    ledger = Ledger(heap=False, part="a")
    with Recorder(ledger, "cpu"):
        x = torch.zeros(100)
        view = x.view(10, 10)[2:]
        assert ledger.live["a"] == 400
        del x
        assert ledger.live["a"] == 400
        with ledger.during("b"):
            y = view + 1
        assert ledger.live == {"a": 400, "b": 320}
        ledger.belongs(y, "c")
        assert ledger.live == {"a": 400, "b": 0, "c": 320}
        del view
    assert ledger.live["a"] == 0
    assert ledger.peaks["b"]["a"] == 400
    assert ledger.peaks["b"][SLACK] == 0


def test_the_heap_keeps_what_was_freed() -> None:
    ledger = Ledger(heap=True, part="a")
    with Recorder(ledger, "cpu"):
        x = torch.zeros(1000)
        del x
        with ledger.during("b"):
            y = torch.zeros(10)
    assert y.numel() == 10
    assert ledger.peaks["b"] == {"a": 0, "b": 40, SLACK: int(HEAP_FACTOR * 4000) - 40 + PROCESS}
