"""Says by name which bases postil does not take, from config.json alone, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from postil.errors import BaseModelError, listed, nearest

# Layers that carry a state from token to token: packed sequences would leak into one another.
RECURRENT = frozenset(
    {"bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe",
     "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_next",
     "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"}
)  # fmt: skip
_RECURRENT_LAYERS = ("mamba", "linear_attention", "recurrent", "conv", "ssm", "rwkv")
# Encoders that transformers offers as causal models; without `is_decoder` they look ahead.
_ENCODERS = frozenset(
    {"bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
     "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta",
     "xlm-roberta-xl", "xmod"}
)  # fmt: skip

BNB_NF4 = "bitsandbytes nf4"


def check_supported(config: dict[str, Any], place: Path, *, trust_remote_code: bool, nf4: bool = False) -> None:
    """Raise BaseModelError, naming the kind, unless the config is that of a decoder postil can adapt.

    nf4: whether weights that bitsandbytes stored in 4 bits (nf4) are welcome, as they are in files.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    quantised_by = _quantisation(config.get("quantization_config"))
    if quantised_by is not None and not (nf4 and quantised_by == BNB_NF4):
        raise BaseModelError(
            f"{place} holds weights quantised by {quantised_by!r}, which postil cannot adapt: "
            "give the directory of the weights before quantisation."
        )
    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise BaseModelError(f"{place / 'config.json'} has no model_type: it is no transformers model.")
    if config.get("is_encoder_decoder"):
        raise BaseModelError(f"{place} is an encoder-decoder ({kind}): postil adapts decoders only.")
    inner = config.get("text_config")
    layers = [
        str(layer).lower()
        for part in (config, inner if isinstance(inner, dict) else {})
        for field in ("layer_types", "layers_block_type", "block_types")
        for layer in (part.get(field) or [])
    ]
    recurrent = next((mark for layer in layers for mark in _RECURRENT_LAYERS if mark in layer), None)
    if kind in RECURRENT or recurrent:
        raise BaseModelError(
            f"{place} is a recurrent (state-space) model ({kind}): its state runs from token to token, "
            "and postil adapts attention models only."
        )
    if kind in _ENCODERS and not config.get("is_decoder"):
        raise BaseModelError(f"{place} is an encoder ({kind}): postil adapts decoders only.")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not (trust_remote_code and config.get("auto_map")):
        raise BaseModelError(
            f"{place} is of the kind {kind!r}, which this transformers has no causal language model for"
            f"{nearest(kind, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}."
        )


def _quantisation(settings: Any) -> str | None:
    """Which quantisation a config's quantization_config names, bitsandbytes' with its kind; None for none."""
    if not settings:
        return None
    if not isinstance(settings, dict):
        return "unknown"
    by_bits = "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else "unknown"
    method = settings.get("quant_method") or by_bits  # older files of bitsandbytes name no method
    method = str(getattr(method, "value", method))  # a live model's is one of transformers' constants
    if method != "bitsandbytes":
        return method
    if settings.get("load_in_8bit") or not settings.get("load_in_4bit"):
        return f"{method} 8-bit"
    return f"{method} {settings.get('bnb_4bit_quant_type', 'fp4')}"


def refuse_code(directory: Path, configs: dict[str, dict[str, Any]]) -> None:
    """Raise BaseModelError when a model directory brings code of its own.

    `configs`: file name to parsed content of its JSON files that may name code (auto_map).
    """
    naming = [name for name, content in configs.items() if content.get("auto_map")]
    files = sorted(path.name for path in directory.glob("*.py"))
    if naming or files:
        found = listed([*(f"auto_map in {name}" for name in naming), *files])
        raise BaseModelError(
            f"{directory} wants to run code of its own ({found}): "
            "read it, then allow it with --trust-remote-code (trust_remote_code=True)."
        )
