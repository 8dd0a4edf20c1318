"""Shrinking: exact at full rank, the best of its rank below, scales folded in, and valid for PEFT and postil."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postil.adapter import Adapter, LoraConfig, attach
from postil.adapter.peft_files import load_adapter, save_adapter
from postil.adapter.shrink import shrink
from postil.errors import AdapterError

PATHS = [f"model.layers.{n}.self_attn.{name}" for n in range(2) for name in ("q_proj", "v_proj")]
PATTERNED = {
    "r": 5, "alpha": 7, "rank_pattern": {"layers.1.self_attn.q_proj": 3},
    "alpha_pattern": {"layers.0.self_attn.v_proj": 2},
}  # fmt: skip
CONFIGS: list[dict[str, Any]] = [
    {"r": 5, "alpha": 7}, {"r": 5, "alpha": 7, "use_rslora": True}, PATTERNED, PATTERNED | {"use_rslora": True}
]  # fmt: skip


def made(**settings: Any) -> Adapter:
    config = LoraConfig(target_modules=("q_proj", "v_proj"), **settings)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for path in PATHS:
        rank = config.rank_of(path)
        tensors[f"{path}.lora_A.weight"] = torch.randn(rank, 12, generator=generator)
        tensors[f"{path}.lora_B.weight"] = torch.randn(9, rank, generator=generator)
    return Adapter(config, tensors, card={"score_card": {}, "recipe": {"base": "b"}})


def change(adapter: Adapter, path: str) -> torch.Tensor:
    """ΔW as the adapter's own configuration scales it, in float64."""
    a, b = (adapter.tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
    return adapter.config.scale_of(path) * (b @ a)


@pytest.mark.parametrize("settings", CONFIGS)
def test_at_full_rank_nothing_moves(settings: dict[str, Any]) -> None:
    adapter = made(**settings)
    found = shrink(adapter, rank=5)
    for path in PATHS:
        torch.testing.assert_close(change(found.adapter, path), change(adapter, path), rtol=1e-6, atol=1e-6)
        assert found.errors[path] == 0
    assert found.error == 0
    assert found.adapter.ranks == adapter.ranks


@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_error_is_the_tail_of_the_singular_values(settings: dict[str, Any], rank: int) -> None:
    adapter = made(**settings)
    found = shrink(adapter, rank=rank)
    for path in PATHS:
        before = change(adapter, path)
        values = torch.linalg.svdvals(before)
        kept = min(rank, adapter.ranks[path])
        assert found.ranks[path] == (adapter.ranks[path], kept)
        assert found.adapter.ranks[path] == kept == found.adapter.config.rank_of(path)
        left = float((before - change(found.adapter, path)).norm())
        assert left == pytest.approx(float(values[kept:].norm()), rel=1e-5, abs=1e-5)  # Eckart-Young
        assert found.errors[path] == pytest.approx(left / float(before.norm()), abs=1e-6)
    lost = sum((change(adapter, path) - change(found.adapter, path)).square().sum() for path in PATHS)
    total = sum(change(adapter, path).square().sum() for path in PATHS)
    assert found.error == pytest.approx(math.sqrt(float(lost / total)), rel=1e-5, abs=1e-6)


@given(st.floats(0.05, 1.0))
def test_keep_takes_the_fewest_ranks_that_hold_the_share(share: float) -> None:
    adapter = made(**PATTERNED)
    found = shrink(adapter, keep=share)
    for path in PATHS:
        energy = torch.linalg.svdvals(change(adapter, path)).square()
        energy = energy / energy.sum()
        rank = found.ranks[path][1]
        assert float(energy[:rank].sum()) >= share - 1e-9
        assert rank == 1 or float(energy[: rank - 1].sum()) < share + 1e-9
        assert found.errors[path] <= math.sqrt(1 - share) + 1e-6


def test_ranks_that_differ_stand_in_the_patterns_and_survive_the_disk(tmp_path: Path) -> None:
    adapter = made(**PATTERNED)
    found = shrink(adapter, keep=0.85)
    assert len(set(found.adapter.ranks.values())) > 1
    save_adapter(found.adapter, tmp_path / "small")
    again = load_adapter(tmp_path / "small")
    assert again.ranks == found.adapter.ranks
    for path in PATHS:
        torch.testing.assert_close(change(again, path), change(found.adapter, path))
    assert not again.config.use_rslora
    assert {again.config.scale_of(path) for path in PATHS} == {1.0}


def test_dtypes_stay_and_stale_cards_go() -> None:
    adapter = made(r=4)
    adapter.tensors = {key: value.bfloat16() for key, value in adapter.tensors.items()}
    found = shrink(adapter, rank=2)
    assert {tensor.dtype for tensor in found.adapter.tensors.values()} == {torch.bfloat16}
    assert "score_card" not in found.adapter.card
    assert found.adapter.card["recipe"] == {"base": "b"}
    assert found.adapter.card["shrunk"]["rank"] == 2
    assert found.adapter.card["shrunk"]["relative_error"] == found.error


def test_a_note_that_says_nothing_stays_one() -> None:
    adapter = made(r=4)
    for path in PATHS:
        adapter.tensors[f"{path}.lora_B.weight"].zero_()
    found = shrink(adapter, keep=0.99)
    assert set(found.ranks.values()) == {(4, 1)}
    assert found.error == 0
    assert all(not tensor.isnan().any() for tensor in found.adapter.tensors.values())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logits_of_the_shrunk_adapter(name: str, lab: Any) -> None:
    """An embedding, saved modules and a bias beside: at full rank the model answers as before."""
    base = lab.tiny(name)
    embedding, norm = ("embed_tokens", "norm") if name == "llama" else ("wte", "ln_f")
    config = LoraConfig(
        r=4, alpha=3, use_rslora=True, target_modules=("all-linear", embedding), modules_to_save=(norm,),
        bias="lora_only" if name == "gpt2" else "none",
    )  # fmt: skip
    model = attach(base, config)
    lab.scramble(model)
    adapter = model.export("default")
    attach(model, shrink(adapter, rank=4).adapter, name="same")
    attach(model, shrink(adapter, rank=1).adapter, name="small")
    logits = {}
    for one in ("default", "same", "small"):
        model.activate(one)
        logits[one] = lab.plain(model, lab.ids)
    torch.testing.assert_close(logits["same"], logits["default"], rtol=0, atol=1e-5)
    assert (logits["small"] - logits["default"]).abs().max() > 1e-3


def test_what_is_refused() -> None:
    adapter = made(r=2)
    for settings in ({}, {"rank": 2, "keep": 0.5}):
        with pytest.raises(AdapterError, match="give either a rank or the share"):
            shrink(adapter, **settings)
    with pytest.raises(AdapterError, match="a rank of 0 leaves nothing"):
        shrink(adapter, rank=0)
    for share in (0.0, 1.5, math.nan):
        with pytest.raises(AdapterError, match="the share of energy to keep lies above 0"):
            shrink(adapter, keep=share)
