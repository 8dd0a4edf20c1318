"""Spectra: those of the explicit ΔW, effective ranks by their definitions, intruder dimensions, full models."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from postil.adapter import Adapter, LoraConfig, attach
from postil.adapter.peft_files import save_adapter
from postil.adapter.spectrum import Spectrum, deltas, intruders_of, rank_for, spectrum
from postil.base import base_from_model
from postil.errors import AdapterError, BaseModelError

PATHS = [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]


def made(config: LoraConfig, d_out: int = 9, d_in: int = 12) -> Adapter:
    """Random A and B at PATHS."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for path in PATHS:
        rank = config.rank_of(path)
        tensors[f"{path}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator)
        tensors[f"{path}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator)
    return Adapter(config, tensors)


def change(adapter: Adapter, path: str) -> torch.Tensor:
    """ΔW formed whole, in float64."""
    a, b = (adapter.tensors[f"{path}.lora_{side}.weight"].double() for side in "AB")
    return adapter.config.scale_of(path) * (b @ a)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "alpha": 6},
        {"r": 4, "alpha": 6, "use_rslora": True},
        {"r": 4, "rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"layers.2.self_attn.q_proj": 1}},
        {"r": 20},  # more than ΔW can have
        {"r": 1},
    ],
)
def test_equals_the_svd_of_the_explicit_change(settings: dict[str, Any]) -> None:
    adapter = made(LoraConfig(target_modules=("q_proj",), **settings))
    found = spectrum(adapter)
    assert [one.path for one in found] == PATHS
    for one in found:
        wanted = torch.linalg.svdvals(change(adapter, one.path))
        got = torch.zeros_like(wanted)
        got[: len(one.values)] = one.values
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
        assert one.norm == pytest.approx(float(change(adapter, one.path).norm()))
        assert one.largest == pytest.approx(float(wanted[0]))
        assert (one.d_out, one.d_in) == (9, 12)
        assert one.base_norm is None


def of(*values: float) -> Spectrum:
    return Spectrum("m", 4, 4, torch.tensor(values, dtype=torch.float64))


def test_equal_singular_values_have_their_number_as_every_rank() -> None:
    one = of(3.0, 3.0, 3.0)
    assert one.entropy_rank == pytest.approx(3)
    assert one.participation_rank == pytest.approx(3)
    assert one.energy_rank() == 3


def test_the_definitions_on_a_worked_example() -> None:
    one = of(2.0, 1.0, 1.0, 0.0)  # p = 1/2, 1/4, 1/4; energies 4, 1, 1
    assert one.entropy_rank == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    assert one.participation_rank == pytest.approx(36 / 18)
    assert [one.energy_rank(share) for share in (0.5, 4 / 6, 0.8, 1.0)] == [1, 1, 2, 3]
    assert one.norm == pytest.approx(math.sqrt(6))


def test_no_change_has_rank_zero() -> None:
    adapter = made(LoraConfig(r=2, target_modules=("q_proj",)))
    for path in PATHS:
        adapter.tensors[f"{path}.lora_B.weight"].zero_()
    (one, *_) = spectrum(adapter)
    assert (one.entropy_rank, one.participation_rank, one.energy_rank(), one.norm) == (0, 0, 0, 0)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), st.floats(0.01, 1.0))
def test_the_energy_rank_is_the_fewest(values: list[float], share: float) -> None:
    falling = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    energy = falling.square() / falling.square().sum()
    rank = rank_for(falling, share)
    assert float(energy[:rank].sum()) >= share - 1e-9
    assert rank == 1 or float(energy[: rank - 1].sum()) < share + 1e-9


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12))
def test_effective_ranks_lie_between_one_and_the_rank(values: list[float]) -> None:
    one = of(*sorted(values, reverse=True))
    assert 1 - 1e-9 <= one.participation_rank <= one.entropy_rank + 1e-6 <= len(values) + 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_beside_a_base_norms_and_orientation_are_right(name: str, lab: Any) -> None:
    base = lab.tiny(name)
    model = attach(base, LoraConfig(r=3, target_modules="all-linear"))
    lab.scramble(model)
    adapter = model.export("default")
    for one, target in zip(spectrum(adapter, base_from_model(base), intruders=True), deltas(adapter), strict=True):
        weight = base.get_submodule(one.path).weight.detach()
        assert one.base_norm == pytest.approx(float(weight.norm()), rel=1e-5)
        turned = weight.T if name == "gpt2" else weight
        assert (one.d_out, one.d_in) == tuple(turned.shape)
        after = turned + (target.scale * target.b @ target.a).float()
        assert one.intruders == intruders_of(turned, after)


def test_an_intruder_is_a_leading_direction_that_the_base_has_not() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.diag(torch.arange(20.0, 0.0, -1.0))
    assert intruders_of(before, before) == 0
    nudged = before + 1e-3 * torch.randn(20, 20, generator=generator)
    assert intruders_of(before, nudged) == 0
    u = torch.ones(20, 1) / math.sqrt(20)  # as far from every axis as can be
    strong, faint = before + 500 * u @ u.T, before + 1e-3 * u @ u.T
    assert intruders_of(before, strong) >= 1
    assert intruders_of(before, faint) == 0
    assert intruders_of(before, -before) == 0  # a vector's sign is free


def test_a_fine_tuned_model_against_its_base(tmp_path: Path, lab: Any) -> None:
    base = lab.tiny("llama")
    base.save_pretrained(tmp_path / "base")
    key = "model.layers.1.mlp.up_proj"
    shift = torch.outer(torch.arange(64.0), torch.ones(32)) * 1e-2
    with torch.no_grad():
        base.get_submodule(key).weight.add_(shift)
    base.save_pretrained(tmp_path / "tuned")
    (one,) = spectrum(tmp_path / "tuned", tmp_path / "base")  # what is equal is left out
    assert one.path == key
    torch.testing.assert_close(one.values[0], shift.norm().double(), rtol=1e-4, atol=0)
    assert one.energy_rank() == 1
    assert one.entropy_rank == pytest.approx(1, abs=0.05)


def test_a_fine_tuned_gpt2_is_turned_as_its_maps_are(tmp_path: Path, lab: Any) -> None:
    base = lab.tiny("gpt2")
    base.save_pretrained(tmp_path / "base")
    before = base.transformer.h[0].attn.c_attn.weight.detach().T.clone()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        base.transformer.h[0].attn.c_attn.weight.add_(torch.randn(32, 96, generator=generator))
        base.transformer.wpe.weight.add_(torch.randn(64, 32, generator=generator))
    base.save_pretrained(tmp_path / "tuned")
    found = {one.path.split(".")[-1]: one for one in spectrum(tmp_path / "tuned", tmp_path / "base", intruders=True)}
    assert (found["c_attn"].d_out, found["c_attn"].d_in) == (96, 32)
    assert found["c_attn"].intruders == intruders_of(before, base.transformer.h[0].attn.c_attn.weight.detach().T)
    assert (found["wpe"].d_out, found["wpe"].d_in) == (64, 32)


def test_stored_names_may_lack_the_inner_prefix(tmp_path: Path, lab: Any) -> None:
    base = lab.tiny("gpt2")
    base.save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    short = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    save_file(short, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        base.transformer.h[0].mlp.c_fc.weight.mul_(1.1)
    base.save_pretrained(tmp_path / "tuned")
    assert [one.path for one in spectrum(tmp_path / "tuned", tmp_path / "base")] == ["transformer.h.0.mlp.c_fc"]


def test_a_head_that_is_the_embedding_is_not_stored_beside_it(tmp_path: Path, lab: Any) -> None:
    base = lab.tiny("llama")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "tied")
    tensors = load_file(tmp_path / "tied/model.safetensors")
    assert "lm_head.weight" not in tensors
    apart = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 0.1}
    (tmp_path / "apart").mkdir()
    shutil.copy(tmp_path / "tied/config.json", tmp_path / "apart")
    save_file(apart, tmp_path / "apart/model.safetensors", metadata={"format": "pt"})
    for tuned, before in (("apart", "tied"), ("tied", "apart")):
        (one,) = spectrum(tmp_path / tuned, tmp_path / before)
        assert one.path == "lm_head"
        assert one.norm == pytest.approx(0.1 * one.d_out**0.5 * one.d_in**0.5, rel=1e-5)


def test_what_is_refused(tmp_path: Path, lab: Any) -> None:
    lab.tiny("llama").save_pretrained(tmp_path / "model")
    lab.tiny("gpt2").save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="is a whole model; give the directory or name of its base"):
        spectrum(tmp_path / "model")
    with pytest.raises(BaseModelError, match=r"stores no model\.embed_tokens.* give the base it came from"):
        spectrum(tmp_path / "model", tmp_path / "other")
    tensors = load_file(tmp_path / "model/model.safetensors")
    for name, value, said in (
        ("norm", float("nan"), "down_proj.weight holds NaN or infinite values in .*broken"),
        ("less", None, "broken stores no .*down_proj.weight, which .*model has"),
    ):
        shutil.copytree(tmp_path / "model", tmp_path / name / "broken")
        key = "model.layers.0.mlp.down_proj.weight"
        other = {k: v for k, v in tensors.items() if k != key} | (
            {} if value is None else {key: torch.full_like(tensors[key], value)}
        )
        save_file(other, tmp_path / name / "broken/model.safetensors", metadata={"format": "pt"})
        with pytest.raises(BaseModelError, match=said):
            spectrum(tmp_path / name / "broken", tmp_path / "model")
    with pytest.raises(BaseModelError, match="no model directory and no known base"):
        spectrum(tmp_path / "model", tmp_path / "gone")
    adapter = made(LoraConfig(r=2, target_modules=("q_proj",)))
    save_adapter(adapter, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="give the base with --base"):
        spectrum(tmp_path / "adapter", intruders=True)
    with pytest.raises(AdapterError, match=r"q_proj is \[32, 32\] .* its ΔW is \[9, 12\]"):
        spectrum(tmp_path / "adapter", base_from_model(lab.tiny("llama")))
    with pytest.raises(AdapterError, match=r"has no module model\.layers\.0\.self_attn\.q_proj"):
        spectrum(tmp_path / "adapter", base_from_model(lab.tiny("gpt2")))
