"""Plans: the field's known figures, tiny models of many kinds counted against real ones, and where they fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from postil.adapter import LoraConfig, attach
from postil.base.quantise import quantise_model, quantised_bytes
from postil.errors import AdapterError, BaseModelError, RecipeError
from postil.planning.plan import Plan, PlanOptions, plan

COMMON: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 101,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = COMMON | {"num_key_value_heads": 2}
BLOCKS = {"vocab_size": 101, "bos_token_id": 1, "eos_token_id": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED | {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", GROUPED | {"head_dim": 16, "attn_logit_softcapping": 2.0, "sliding_window": 5}),
    "phi3": ("Phi3Config", GROUPED),
    "gpt2": ("GPT2Config", BLOCKS | {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("GPTNeoXConfig", COMMON | {"rotary_pct": 0.5}),
    "opt": ("OPTConfig", COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 64}),
    "bloom": ("BloomConfig", BLOCKS | {"hidden_size": 64, "n_layer": 3, "n_head": 4}),
}  # fmt: skip
LENGTHS = (9, 3, 12)


@pytest.fixture(params=list(KINDS))
def config(request: pytest.FixtureRequest) -> PretrainedConfig:
    name, settings = KINDS[request.param]
    made: PretrainedConfig = getattr(transformers, name)(**settings)
    return made


def planned(config: PretrainedConfig, place: Path, **settings: Any) -> Plan:
    """A plan from nothing but a config.json, in float32, for a pack of LENGTHS."""
    config.save_pretrained(place)
    return plan(place / "config.json", lengths=LENGTHS, dtype="float32", held_out=False, **settings)


def real(config: PretrainedConfig) -> Any:
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_counts_are_those_of_the_real_model(config: PretrainedConfig, tmp_path: Path) -> None:
    found = planned(config, tmp_path, r=3, target_modules="all-linear")
    model = real(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    resident = attach(model, LoraConfig(r=3, target_modules="all-linear")).resident("default")
    assert found.counted.parameters == parameters
    assert found.counted.trained == resident.parameters
    assert found.counted.modules == len(resident.targets)
    assert found.storage.adapter == 4 * resident.parameters
    assert found.memory.masters == found.memory.gradients == resident.flat.nbytes
    assert found.memory.optimiser == 2 * resident.flat.nbytes
    held = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    assert 0.98 < found.memory.weights / sum(held.values()) < 1.1  # rotary tables and the like beside
    assert found.memory.activations > 0


def test_every_kind_is_planned_on_a_cpu_too(config: PretrainedConfig, tmp_path: Path) -> None:
    found = planned(config, tmp_path, device="cpu", method="full")
    parameters = found.counted.parameters
    assert found.memory.masters == pytest.approx(4 * parameters, rel=0.01)
    assert found.memory.optimiser == pytest.approx(8 * parameters, rel=0.01)
    assert found.memory.gradients >= 0.99 * 4 * parameters


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_nf4_weights_are_counted_to_the_byte(kind: str, tmp_path: Path) -> None:
    name, settings = KINDS[kind]
    config = getattr(transformers, name)(**settings)
    dense, found = planned(config, tmp_path), planned(config, tmp_path, method="qlora")
    model = real(config)
    quantise_model(model)
    made = quantised_bytes(model)
    # 256 pairs of values, one table for the process, lie beside them
    assert dense.memory.weights - found.memory.weights == 2 * made.bf16 - made.nf4 - 8 * 256


def test_checkpointing_takes_less_and_says_so(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**GROUPED | {"num_hidden_layers": 12})
    config.save_pretrained(tmp_path)
    settings: dict[str, Any] = {"pack_tokens": 512, "sequence_tokens": 64, "dtype": "float32"}
    for device in ("cpu", "cuda"):
        plain = plan(tmp_path, device=device, **settings)
        assert plain.checkpointed is not None
        assert plain.checkpointed.activations < plain.memory.activations / 3
        again = plan(tmp_path, device=device, gradient_checkpointing=True, **settings)
        assert again.checkpointed is None
        assert again.memory == plain.checkpointed


def test_few_layers_are_continued_to_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.LlamaConfig(**GROUPED | {"num_hidden_layers": 7})
    config.save_pretrained(tmp_path)
    for method, device in (("lora", "cpu"), ("full", "cpu"), ("qlora", "cuda")):
        short = plan(tmp_path, method=method, device=device, pack_tokens=96)
        monkeypatch.setattr("postil.planning.memory.uniform", lambda *_: False)
        whole = plan(tmp_path, method=method, device=device, pack_tokens=96)
        monkeypatch.undo()
        assert short.memory.total == pytest.approx(whole.memory.total, rel=2e-3)
        assert short.memory.weights == whole.memory.weights


def test_a_matrix_of_4096_squared_at_rank_8() -> None:
    found = plan("7B", gradient_checkpointing=True)
    assert found.counted.largest is not None
    path, d_out, d_in, beside = found.counted.largest
    assert (d_out, d_in, beside) == (4096, 4096, 65_536)
    assert any("65,536 adapter parameters at r=8 beside its 16.8 M (0.39%)" in note for note in found.notes)
    assert path == "model.layers.0.self_attn.q_proj"


def test_7b_with_lora_takes_about_16_gb() -> None:
    found = plan("7B", gradient_checkpointing=True)
    assert found.counted.parameters == 6_738_415_616
    assert found.counted.trained == 32 * 4 * 65_536
    assert 15e9 < found.memory.total < 16.5e9
    assert any("16 GB" in note and "15.57 GB" in note for note in found.notes)
    cards = {card.name: card for card in found.cards}
    assert cards["RTX 4090"].fits
    assert cards["RTX 4090"].why.endswith("GiB to spare")


def test_7b_in_full_with_and_without_masters() -> None:
    found = plan("7B", method="full", pack_tokens=512)
    (said,) = (note for note in found.notes if "masters" in note and "bytes a parameter" in note)
    for figure in ("12 bytes a parameter, 80.9 GB", "masters 16 bytes, 107.8 GB", "20 bytes, 134.8 GB"):
        assert figure in said
    memory, parameters = found.memory, found.counted.parameters
    for part, size in ((memory.weights, 2), (memory.masters, 4), (memory.optimiser, 8)):
        assert part == pytest.approx(size * parameters, rel=1e-6)  # rotary tables and alignment beside
    assert memory.total > 20 * parameters
    assert found.storage.adapter is None
    assert not any(card.fits for card in found.cards if card.gib <= 141)


def test_70b_in_nf4_is_not_for_24_gb() -> None:
    found = plan("70B", method="qlora", gradient_checkpointing=True)
    assert found.counted.parameters == 68_976_648_192
    assert 36e9 < found.memory.weights < 37e9
    cards = {card.name: card for card in found.cards}
    for name in ("RTX 4090", "RTX 3090"):
        assert not cards[name].fits
        assert "weights alone" in cards[name].why
        assert "streaming" in cards[name].why
    assert cards["RTX A6000"].fits
    assert cards["H100 80GB"].fits


def test_a_card_that_fits_with_checkpointing_says_so() -> None:
    cards = {card.name: card for card in plan("7B").cards}
    assert not cards["RTX 4090"].fits
    assert cards["RTX 4090"].why == "fits with gradient checkpointing"
    assert "short" in cards["T4"].why or cards["T4"].why == "fits with gradient checkpointing"


def test_fifty_models_of_one_base() -> None:
    storage = plan("7B", gradient_checkpointing=True, pack_tokens=64, copies=50).storage
    assert storage.whole == 50 * 13_476_831_232
    assert storage.shared == 13_476_831_232 + 50 * 33_554_432
    assert storage.shared < storage.whole / 40


def test_logits_are_never_whole() -> None:
    found = plan("8B", pack_tokens=4096, gradient_checkpointing=True)
    assert found.undivided_logits == 4 * 4096 * 128_256
    assert found.memory.loss + found.memory.working < found.undivided_logits


@pytest.mark.parametrize("name", ["7b", "Llama-2-13B", "llama-3.1-70b", "smollm2-135m-instruct"])
def test_names_of_shapes(name: str) -> None:
    found = plan(name, pack_tokens=16)
    assert found.architecture == "llama"
    assert found.dtype == "bfloat16"


def test_a_plan_reads_back_from_its_json() -> None:
    found = plan("smollm2-135m-instruct", pack_tokens=16)
    again = Plan.parse(json.loads(found.model_dump_json()))
    assert again == found


def test_sequences_of_a_pack() -> None:
    assert PlanOptions(pack_tokens=1000, sequence_tokens=400).sequences == (400, 400, 200)
    assert PlanOptions(pack_tokens=100, sequence_tokens=400).sequences == (100,)
    assert PlanOptions(lengths=(3, 4)).sequences == (3, 4)


def test_a_directory_in_four_bits_is_planned_so(tmp_path: Path) -> None:
    config = LlamaConfig(**GROUPED)
    config.save_pretrained(tmp_path / "dense")
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config.save_pretrained(tmp_path / "nf4")
    stored, dense = (plan(tmp_path / name, lengths=LENGTHS, dtype="float32", method=method)
                     for name, method in (("nf4", "lora"), ("dense", "qlora")))  # fmt: skip
    assert stored.memory == dense.memory
    assert stored.storage.base < dense.storage.base
    assert "stored in 4 bits, so what trains beside it is planned as qlora" in stored.notes[0]
    with pytest.raises(RecipeError, match="4-bit weights cannot be"):
        plan(tmp_path / "nf4", method="full")


def test_sequences_are_no_longer_than_the_context(tmp_path: Path) -> None:
    LlamaConfig(**GROUPED).save_pretrained(tmp_path)
    found = plan(tmp_path, pack_tokens=200)
    assert found.options.sequences == (64, 64, 64, 8)
    assert found.notes[0] == "sequences of 64 tokens, the base's context"


def test_code_beside_a_config_is_not_run(tmp_path: Path) -> None:
    LlamaConfig(**GROUPED).save_pretrained(tmp_path)
    (tmp_path / "train.py").write_text("raise SystemExit")
    assert plan(tmp_path / "config.json").architecture == "llama"


def test_a_guard_keeps_the_base_beside_a_whole_model(tmp_path: Path) -> None:
    LlamaConfig(**GROUPED).save_pretrained(tmp_path)
    for method, share in (("lora", 0), ("full", 1)):
        bare, guarded = (plan(tmp_path, lengths=LENGTHS, method=method, guard=guard) for guard in (False, True))
        assert guarded.memory.origin == share * 2 * guarded.counted.parameters  # bfloat16
        assert guarded.memory.beside_weights >= bare.memory.beside_weights + guarded.memory.origin


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"'70c' is no directory .*did you mean '70b'"):
        plan("70c")
    with pytest.raises(RecipeError, match="unknown key 'methode'"):
        plan("7B", methode="lora")
    with pytest.raises(AdapterError, match="did you mean 'q_proj'"):
        plan("7B", target_modules="qproj")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(BaseModelError, match="recurrent"):
        plan(tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(BaseModelError, match="GGUF"):
        plan(tmp_path / "model.gguf")
    with pytest.raises(BaseModelError, match="fetch it with `postil base get"):
        plan("smollm2-135m-instruct-hub")
