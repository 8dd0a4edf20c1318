"""PEFT 0.21.2's configuration of a LoRA adapter: which fields are understood, and postil's own from and to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from postil.adapter.adapter import Adapter
from postil.adapter.config import ALL_LINEAR, ATTENTION, FEED_FORWARD, LoraConfig
from postil.adapter.peft_keys import saved_modules
from postil.errors import AdapterError, listed

PEFT_VERSION = "0.21.2"

# Every field of PEFT 0.21.2's LoraConfig is in exactly one of the three sets (a test holds them to it).
SUPPORTED = frozenset({
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules",
    "exclude_modules", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "layers_to_transform",
    "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights",
})  # fmt: skip
REFUSED = frozenset({
    "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "trainable_token_indices",
    "target_parameters", "use_qalora", "use_bdlora", "megatron_config", "arrow_config", "velora_config",
    "monteclora_config", "kasa_config", "lora_ga_config", "corda_config", "eva_config", "loftq_config",
    "ensure_weight_tying",
})  # fmt: skip
HARMLESS = frozenset({
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "runtime_config",
    "megatron_core",  # read only with megatron_config
    "qalora_group_size",  # read only with use_qalora
})  # fmt: skip
# Initialisations that put nothing into the base; the others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it.
INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def peft_targets(adapter: Adapter) -> str | list[str]:
    """What PEFT needs as target_modules to adapt the same modules.

    Plain names and regular expressions as they are; postil's own words become the sorted paths of the
    adapted modules (as does a regular expression beside layers_to_transform, a pair that PEFT refuses).
    """
    wanted = adapter.config.target_modules
    if isinstance(wanted, tuple) and not _has_words(wanted):
        return sorted(wanted)
    if isinstance(wanted, str) and not _has_words((wanted,)) and adapter.config.layers_to_transform is None:
        return wanted
    return sorted(adapter.modules)


def to_peft(adapter: Adapter) -> dict[str, Any]:
    """PEFT's configuration of an adapter, every field written."""
    config = adapter.config
    targets = peft_targets(adapter)
    names = config.target_modules
    as_paths = not isinstance(targets, str) and (not isinstance(names, tuple) or targets != sorted(names))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "peft_version": PEFT_VERSION,
        "base_model_name_or_path": adapter.base_name or None,
        "revision": None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": whole(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "exclude_modules": _plain(config.exclude_modules),
        "fan_in_fan_out": bool(adapter.card.get("fan_in_fan_out")),
        "bias": config.bias,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "modules_to_save": saved_modules(config, adapter.tensors) or _plain(config.modules_to_save),
        "layers_to_transform": None if as_paths else _plain(config.layers_to_transform),
        "layers_pattern": None if as_paths else _plain(config.layers_pattern),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": {key: whole(value) for key, value in config.alpha_pattern.items()},
        "init_lora_weights": True,
    }


def from_peft(peft: Mapping[str, Any], file: Path) -> LoraConfig:
    """postil's configuration of an adapter from PEFT's in `file`. Raises AdapterError naming file and field."""

    def listed_or_none(field: str) -> Any:
        value = peft.get(field)
        return None if value is None or value in ("", []) else value

    values = {
        "r": peft.get("r", 8),
        "alpha": peft.get("lora_alpha", 8),
        "dropout": peft.get("lora_dropout", 0.0),
        "target_modules": listed_or_none("target_modules"),
        "exclude_modules": listed_or_none("exclude_modules"),
        "use_rslora": peft.get("use_rslora") or False,
        "rank_pattern": peft.get("rank_pattern") or {},
        "alpha_pattern": peft.get("alpha_pattern") or {},
        "layers_to_transform": listed_or_none("layers_to_transform"),
        "layers_pattern": listed_or_none("layers_pattern"),
        "bias": peft.get("bias", "none"),
        "modules_to_save": listed_or_none("modules_to_save"),
        "init": "gaussian" if peft.get("init_lora_weights") == "gaussian" else "kaiming",
    }
    try:
        return LoraConfig(**values)
    except AdapterError as problem:
        raise AdapterError(f"{file}: {problem}") from None


def check_fields(peft: Mapping[str, Any], file: Path) -> None:
    """Raises AdapterError for every field that would make this adapter something else than plain LoRA."""
    if peft.get("peft_type") != "LORA":
        raise AdapterError(f"{file}: peft_type is {peft.get('peft_type')!r}; postil reads LORA adapters only")
    refused = sorted(field for field in REFUSED if peft.get(field))
    if refused:
        raise AdapterError(
            f"{file}: {listed(refused)} set: this changes the mathematics and postil has plain LoRA only; "
            "merge the adapter into its base with PEFT, or train it without"
        )
    unknown = sorted(
        key for key, value in peft.items() if key not in SUPPORTED | REFUSED | HARMLESS and not _empty(value)
    )
    if unknown:
        raise AdapterError(
            f"{file}: unknown field {listed(unknown)} (written by PEFT {peft.get('peft_version') or 'unknown'}; "
            f"postil knows {PEFT_VERSION}'s); it may change what the adapter means, so save it without"
        )
    init = peft.get("init_lora_weights", True)
    if not any(init is known or (isinstance(init, str) and init == known) for known in INITS):
        raise AdapterError(
            f"{file}: init_lora_weights is {init!r}, which also changes the base's weights; convert it with PEFT "
            "(save_pretrained with path_initial_model_for_weight_conversion) and load that"
        )


def _empty(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def resolved(adapter: Adapter) -> LoraConfig:
    """An adapter made elsewhere, with what means something else here spelled as paths: PEFT's default of
    target_modules, names equal to postil's words, and modules_to_save matched as endings without a dot."""
    config, changes = adapter.config, dict[str, Any]()
    wanted = config.target_modules
    names = (wanted,) if isinstance(wanted, str) else wanted or ()
    if wanted is None or (wanted != ALL_LINEAR and _has_words(names)):
        changes["target_modules"] = tuple(sorted(adapter.modules))
    saved: set[str] = set()
    for key in adapter.tensors:
        owner = key.rpartition(".")[0]
        if ".lora_" not in key and any(
            owner.endswith(name) and owner != name and not owner.endswith("." + name)
            for name in config.modules_to_save or ()
        ):
            saved.add(owner)
    if saved:
        changes["modules_to_save"] = tuple(sorted(saved | set(saved_modules(config, adapter.tensors))))
    return LoraConfig(**(config.model_dump() | changes)) if changes else config


def _has_words(names: Iterable[str]) -> bool:
    return any(name in (ATTENTION, FEED_FORWARD, ALL_LINEAR) for name in names)


def whole(number: float) -> float | int:
    """A whole number without its point, as PEFT's own files have it."""
    return int(number) if float(number).is_integer() else number


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
