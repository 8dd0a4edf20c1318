"""Tiny models of every listed architecture, and both libraries' ways to run and to save an adapter on them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from postil.adapter import AdaptedModel, LoraConfig
from postil.kernels.layout import Layout, positions_of

PEFT_SAYS = (  # what PEFT warns of where all is as it should be
    ".*is_gradient_checkpointing.*",
    ".*base_model_name_or_path. was renamed",
    "Setting .save_embedding_layers. to",
    "Could not find a config file in .*ForCausalLM|Could not find a config file in .*HeadModel",
    "fan_in_fan_out is set to False but the target module is .Conv1D",
    "Model with .tie_word_embeddings=True. and the tied_target_modules",
    r"\s*Model has .tie_word_embeddings=True. and a tied layer is part of the adapter",
)
COMMON: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 101,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {"intermediate_size": 64, "num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GROUPED),
    "mistral": ("mistral", GROUPED | {"sliding_window": 5}),
    "qwen2": ("qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 8}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("phi3", GROUPED),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {"intermediate_size": 64, "rotary_pct": 0.5}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "falcon": ("falcon", {"bias": True}),
    "bloom": ("bloom", {}),
}
LENGTHS = (9, 1, 14)


class Lab:
    """What the tests of this folder share (they cannot import a conftest)."""

    architectures = tuple(MODELS)
    lengths = LENGTHS
    ids = torch.randint(3, 101, (sum(LENGTHS),), generator=torch.Generator().manual_seed(5))

    def __init__(self, peft: Any) -> None:
        self.peft = peft

    @staticmethod
    def tiny(name: str, **changes: Any) -> PreTrainedModel:
        """A float32 model of two layers, the same at every call, its every parameter random."""
        kind, settings = MODELS[name]
        config = AutoConfig.for_model(kind, **COMMON | settings | changes)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        return model

    @staticmethod
    @torch.no_grad()
    def plain(model: Any, ids: torch.Tensor | None = None, lengths: Sequence[int] = LENGTHS) -> torch.Tensor:
        """Logits [tokens, vocabulary] of a transformers or PEFT model, one sequence at a time."""
        parts = (Lab.ids if ids is None else ids).split(list(lengths))
        return torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts])

    @staticmethod
    @torch.no_grad()
    def packed(
        model: AdaptedModel, ids: torch.Tensor | None = None, lengths: Sequence[int] = LENGTHS
    ) -> torch.Tensor:
        """The same logits from postil's own pass, all sequences in one flat batch under the active adapter."""
        spans = model.spans_for(model.active, sum(lengths))
        with model.using(Layout.packed(lengths, spans)):
            hidden = model.hidden(Lab.ids if ids is None else ids, positions_of(lengths))
            return model.logits(hidden, spans)

    @staticmethod
    def peft_fields(config: LoraConfig) -> dict[str, Any]:
        """PEFT's LoraConfig arguments that mean the same, written down here a second time."""
        fields = config.model_dump(exclude_defaults=True)
        out = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
        out |= {"r": config.r, "lora_alpha": config.alpha, "task_type": "CAUSAL_LM"}
        out.pop("alpha", None)
        return out

    def peft_model(self, base: PreTrainedModel, config: LoraConfig, size: float = 0.1) -> Any:
        """PEFT's adapter of this configuration on a base, every trainable number moved."""
        model = self.peft.get_peft_model(base, self.peft.LoraConfig(**self.peft_fields(config)))
        chance = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=chance) * size)
        return model.eval()

    def peft_load(self, base: PreTrainedModel, directory: Path, **settings: Any) -> Any:
        """PEFT's own reading of an adapter directory onto a base; a key lost or left over fails."""
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = self.peft.PeftModel.from_pretrained(base, str(directory), **settings)
        report = model.load_adapter(str(directory), "default", is_trainable=settings.get("is_trainable", False))
        assert not report.unexpected_keys
        return model.eval()

    @staticmethod
    def scramble(model: AdaptedModel, name: str = "default", seed: int = 1, size: float = 0.1) -> None:
        """Every number of a resident adapter moved, as by training."""
        chance = torch.Generator().manual_seed(seed)
        for view in model.resident(name).keys.values():
            view.add_(torch.randn(view.shape, generator=chance) * size)

    @staticmethod
    def near(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> float:
        """Assert that no number differs by more than `bound`; returns the largest difference."""
        gap = float((found - wanted).abs().max())
        assert gap <= bound, f"{gap:.3g} is more than {bound:g}"
        return gap


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The helpers above; without the test extra's PEFT everything here is skipped."""
    return Lab(pytest.importorskip("peft"))


@pytest.fixture(autouse=True)
def silent() -> Iterator[None]:
    """PEFT's known warnings are no errors, and transformers prints no lines about tiny configurations."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        for message in PEFT_SAYS:
            warnings.filterwarnings("ignore", message)
        yield
    transformers.logging.set_verbosity(level)


@pytest.fixture(params=list(MODELS))
def architecture(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return str(request.param)
