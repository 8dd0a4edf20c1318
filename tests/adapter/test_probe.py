"""The probe at attaching: windows that only a mask knows never run packed, and one wrong token is enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from postil.adapter import AdaptedModel, LoraConfig, attach, detach
from postil.adapter import probe as probing
from postil.errors import AdapterError, BaseModelError
from postil.kernels.layout import Layout, Span, Spans, positions_of

SHARED: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Their window (or chunk) lies in the attention mask alone.
MASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "phimoe": ("PhimoeConfig", {"sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeConfig", EXPERTS | {
        "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2,
        "shared_expert_intermediate_size": 32}),
    "doge": ("DogeConfig", {"sliding_window": 4}),
    "llama4": ("Llama4TextConfig", {
        "attention_chunk_size": 4, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1,
        "intermediate_size_mlp": 64}),
}  # fmt: skip
LENGTHS = (12, 12, 5)


def made(name: str, **changes: Any) -> PreTrainedModel:
    """A tiny random model whose logits of long and short sequences differ by what a window hides."""
    kind, settings = MASKED[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**SHARED | settings | changes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def packed(model: AdaptedModel, ids: torch.Tensor, user: str) -> torch.Tensor:
    """Logits of sequences of LENGTHS in one pack, all with one adapter."""
    spans = Spans.of([Span(0, sum(LENGTHS), model.resident(user).slot)])
    with torch.no_grad(), model.using(Layout.packed(LENGTHS, spans)):
        return model.logits(model.hidden(ids, positions_of(LENGTHS)), spans)


@pytest.mark.parametrize("name", MASKED)
def test_beyond_a_window_that_only_the_mask_knows_each_sequence_is_its_own(name: str, lab: Any) -> None:
    base = made(name)
    before = {path: dict(module.__dict__) for path, module in base.named_modules()}
    config = base.config.to_dict()
    model = attach(base, LoraConfig(target_modules=("q_proj", "v_proj")), name="a")
    assert not model.packs
    lab.scramble(model, "a")
    ids = torch.randint(3, 101, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    found = packed(model, ids, "a")
    for logits, part in zip(found.split(LENGTHS), ids.split(LENGTHS), strict=True):
        torch.testing.assert_close(logits, lab.plain(model, part), rtol=0, atol=1e-5)
    detach(model)
    assert base.config.to_dict() == config
    after = {path: dict(module.__dict__) for path, module in base.named_modules()}
    windows = [[inner.get(f) for f in probing.WINDOW_FIELDS] for side in (before, after) for inner in side.values()]
    assert windows[: len(before)] == windows[len(before) :]


@pytest.mark.parametrize("window", [1, 2, 3, 4, 4096])
def test_a_window_of_any_size_is_looked_at(window: int) -> None:
    """However long or short it is, also where the probe's sequences are within it."""
    assert not attach(made("phimoe", sliding_window=window)).packs


def test_a_mask_without_a_window_runs_packed() -> None:
    assert attach(made("phimoe", sliding_window=None)).packs
    assert attach(made("qwen2_moe", use_sliding_window=False)).packs


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma2", "gemma3"])
@pytest.mark.parametrize("window", [1, 3, 4096])
def test_a_window_that_our_attention_is_given_runs_packed(name: str, window: int, lab: Any) -> None:
    assert attach(lab.tiny(name, sliding_window=window)).packs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype, lab: Any) -> None:
    """Their rounding is no fault, and a window that is not kept is one all the same."""
    for name in ("llama", "mistral", "gemma3", "gpt2"):
        assert attach(lab.tiny(name).to(dtype)).packs
    assert not attach(made("phimoe").to(dtype)).packs


def spoilt(model: PreTrainedModel, wrong: Callable[[torch.Tensor], torch.Tensor]) -> PreTrainedModel:
    """A model that adds `wrong(ids)` to the logits of a plain call only, which postil's way does not see."""
    real = model.forward

    def forward(input_ids: torch.Tensor, **options: Any) -> Any:
        out = real(input_ids=input_ids, **options)
        out.logits = out.logits + wrong(input_ids)
        return out

    model.__dict__["forward"] = forward
    return model


def test_one_wrong_token_among_right_ones_is_noticed(lab: Any) -> None:
    """The mean of all logits would hide it."""

    def last(ids: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(*ids.shape, 101)
        out[:, -1, 0] = 0.02
        return out

    with pytest.raises(BaseModelError, match=r"gives other logits through postil .* not supported"):
        attach(spoilt(lab.tiny(), last))


def test_what_is_no_decoder_inside_is_refused_by_name() -> None:
    config = transformers.ModernBertDecoderConfig(
        vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with pytest.raises(BaseModelError, match=r"ModernBertDecoderForCausalLM does not run as a decoder .* not supp"):
        attach(transformers.ModernBertDecoderForCausalLM(config))


def test_rows_that_are_no_tokens_are_refused() -> None:
    """CPM-Ant puts rows of its own before the tokens."""
    config = transformers.CpmAntConfig(
        vocab_size=101, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=64, num_hidden_layers=2
    )  # fmt: skip
    model = attach(transformers.CpmAntForCausalLM(config), LoraConfig(target_modules="all-linear"))
    ids = torch.arange(5)
    with (
        model.using(Layout.packed((5,), model.spans_for({"default": 1.0}, 5))),
        pytest.raises(AdapterError, match="gives an adapted module 37 rows for 5 tokens"),
    ):
        model.hidden(ids, ids)
