"""Adapter directories on disk: PEFT 0.21.2's LoRA files plus postil.json, written atomically, read strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from postil.adapter.adapter import Adapter
from postil.adapter.config import ALL_LINEAR, ATTENTION, FEED_FORWARD, LoraConfig
from postil.errors import AdapterError, listed
from postil.files import atomic_directory

FORMAT = 1  # of postil.json
PEFT_VERSION = "0.21.2"
CONFIG, WEIGHTS, CARD, OWN = "adapter_config.json", "adapter_model.safetensors", "README.md", "postil.json"
VERSION = "version.json"  # lies beside an adapter in a registry (postil.registry.version)
PREFIX = "base_model.model."

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
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")


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


def save_adapter(adapter: Adapter, directory: str | Path) -> Path:
    """Write `adapter` as a PEFT adapter directory with postil.json beside; equal adapters give equal bytes.

    Raises AdapterError for a tensor that is not finite or not floating point, StorageError when the system
    refuses (then nothing is left behind and an adapter that was there stays).
    """
    target = Path(directory)
    if (target / VERSION).is_file():
        raise AdapterError(f"{target} is a published version, which never changes; save under another name")
    if not adapter.modules:
        raise AdapterError("this adapter holds no LoRA tensors; there is nothing to save")
    _check_values(adapter.tensors, "this adapter")
    modules = set(adapter.modules)
    # a clone each: tensors that share memory (fused A) are refused by safetensors
    tensors = {
        PREFIX + _peft_key(key, modules): value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in sorted(adapter.tensors.items())
    }
    with atomic_directory(target, marker=OWN, carry=True) as temporary:
        _write(temporary / CONFIG, _json(_peft_config(adapter)))
        _write(temporary / OWN, own_text(adapter))
        _write(temporary / CARD, _model_card(adapter))
        try:
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as problem:  # its way to say that the disk is full
            raise OSError(f"{WEIGHTS}: {problem}") from problem
        # safetensors makes files 0600; the others have what the umask allows
        (temporary / WEIGHTS).chmod((temporary / CONFIG).stat().st_mode & 0o777)
    return target


def load_adapter(directory: str | Path) -> Adapter:
    """Read an adapter directory made by postil or PEFT, strictly.

    Every key must be understood and every configuration field that changes the mathematics supported.
    Tensors keep their dtype, on the CPU, under PEFT's keys without `base_model.model.` and without the names
    of its wrappers. Raises AdapterError naming the file, the field or the keys, and the mend.
    """
    path = Path(directory)
    peft = read_config(path)
    return assembled(path, peft, _read_weights(path), path / WEIGHTS)


def read_config(path: Path) -> dict[str, Any]:
    """PEFT's configuration in an adapter directory, every field understood. Raises as load_adapter does."""
    peft = _read_json(_config_file(path))
    _check_fields(peft, path / CONFIG)
    return peft


def assembled(path: Path, peft: Mapping[str, Any], raw: Mapping[str, torch.Tensor], weights: Path) -> Adapter:
    """The adapter in the directory `path` from its configuration and the tensors read from `weights`."""
    config = _config_from_peft(peft, path / CONFIG)
    tensors = _normalised(raw, config, weights)
    base: dict[str, str] = {}
    card: dict[str, Any] = {}
    base_name = str(peft.get("base_model_name_or_path") or "")
    if (path / OWN).exists():
        own = _own_part(path / OWN)
        config = _own_config(own["config"], config, path)
        base, card, base_name = own["base"], own["card"], own["base_name"]
    adapter = Adapter(config, tensors, base, base_name, card, path)
    if not (path / OWN).exists():
        if peft.get("fan_in_fan_out"):
            card["fan_in_fan_out"] = True
        adapter.config = _resolved(adapter)
    return adapter


def _has_words(names: Iterable[str]) -> bool:
    return any(name in (ATTENTION, FEED_FORWARD, ALL_LINEAR) for name in names)


# -- writing --------------------------------------------------------------------------------------------


def _peft_key(key: str, modules: set[str]) -> str:
    """The base's own parameters of an adapted module lie under PEFT's wrapper as `base_layer`."""
    path, _, name = key.rpartition(".")
    return f"{path}.base_layer.{name}" if path in modules and name in ("bias", "weight") else key


def _peft_config(adapter: Adapter) -> dict[str, Any]:
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
        "lora_alpha": _whole(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "exclude_modules": _plain(config.exclude_modules),
        "fan_in_fan_out": bool(adapter.card.get("fan_in_fan_out")),
        "bias": config.bias,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "modules_to_save": _saved_modules(config, adapter.tensors) or _plain(config.modules_to_save),
        "layers_to_transform": None if as_paths else _plain(config.layers_to_transform),
        "layers_pattern": None if as_paths else _plain(config.layers_pattern),
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": {key: _whole(value) for key, value in config.alpha_pattern.items()},
        "init_lora_weights": True,
    }


def _saved_modules(config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The full paths of the modules saved whole: PEFT takes names as endings without a dot ("norm" is
    input_layernorm too), so that names alone would mean other modules there."""
    found = set()
    for key in tensors:
        if ".lora_" in key:
            continue
        parts = key.split(".")[:-1]
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if any(path == name or path.endswith("." + name) for name in config.modules_to_save or ()):
                found.add(path)
                break
    return sorted(found)


def _whole(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def own_text(adapter: Adapter) -> str:
    """What postil.json holds of an adapter."""
    return _json(
        {
            "format": FORMAT,
            "base": adapter.base,
            "base_name": adapter.base_name,
            "config": adapter.config.model_dump(mode="json"),
            "card": adapter.card,
        }
    )


def _json(value: Any) -> str:
    # rank_pattern's order has a meaning (first match wins), so patterns keep it: only field names are sorted
    ordered = {key: value[key] for key in sorted(value)}
    return json.dumps(ordered, indent=2, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _model_card(adapter: Adapter) -> str:
    config = adapter.config
    head = [f"base_model: {json.dumps(adapter.base_name, ensure_ascii=False)}"] if adapter.base_name else []
    head += ["library_name: peft", "tags:", "- lora", "- postil"]
    fingerprint = adapter.base.get("source")
    lines = [
        f"A LoRA adapter: {adapter.parameters:,} parameters beside {len(adapter.modules)} modules of "
        f"{adapter.base_name or 'its base model'}, r = {config.r}, alpha = {_whole(config.alpha)}.",
        f"It was made with postil and can be read by PEFT {PEFT_VERSION} and what reads its files.",
    ]
    if fingerprint:
        lines.append(f"It belongs to the base with the fingerprint `{fingerprint}`; with another it means nothing.")
    lines.append("How it was made (recipe, data, template) is in `postil.json`.")
    return "\n".join(["---", *head, "---", "", "# LoRA adapter", "", *lines, ""])


# -- reading --------------------------------------------------------------------------------------------


def _config_file(path: Path) -> Path:
    if not path.exists():
        raise AdapterError(f"{path} does not exist; name a directory that holds {CONFIG}")
    if not path.is_dir():
        raise AdapterError(f"{path} is a file; name the directory that holds {CONFIG} and {WEIGHTS}")
    file = path / CONFIG
    if not file.is_file():
        inner = sorted(str(found.parent) for found in path.glob(f"*/{CONFIG}"))
        names = _names_in(path)
        hint = f"there is one in {listed(inner)}" if inner else f"it holds {listed(names) if names else 'nothing'}"
        raise AdapterError(f"{path} holds no {CONFIG}; {hint}. Name a directory that PEFT or postil wrote.")
    return file


def _names_in(path: Path) -> list[str]:
    return sorted(found.name for found in path.iterdir())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise AdapterError(f"{path} is no JSON ({problem}); copy the adapter again or save it anew") from None
    except OSError as problem:
        raise AdapterError(f"{path} cannot be read ({problem.strerror})") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path} must hold a JSON object, found {type(value).__name__}; save the adapter anew")
    return value


def _check_fields(peft: Mapping[str, Any], file: Path) -> None:
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


def _config_from_peft(peft: Mapping[str, Any], file: Path) -> LoraConfig:
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


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    file = path / WEIGHTS
    if not file.is_file():
        if (path / "adapter_model.bin").exists():
            raise AdapterError(
                f"{path / 'adapter_model.bin'} is a pickle, which can run code and is never opened here; "
                f"`postil convert {path}` reads it safely and writes {WEIGHTS}"
            )
        raise AdapterError(f"{path} holds no {WEIGHTS}; it holds {listed(_names_in(path))}. Copy it again, whole.")
    try:
        return dict(load_file(file))
    except SafetensorError as problem:
        raise AdapterError(f"{file} is truncated or corrupt ({problem}); copy the adapter again") from None
    except OSError as problem:
        raise AdapterError(f"{file} cannot be read ({problem})") from None


def _normal_key(key: str) -> str | None:
    """postil's key for a key of PEFT's; None for what PEFT itself never uses (originals of saved modules)."""
    key = key.removeprefix(PREFIX)
    if ".original_module." in key:
        return None
    key = re.sub(r"\.modules_to_save\.(default\.)?", ".", key)
    key = re.sub(r"\.base_layer\.(weight|bias)$", r".\1", key)
    key = re.sub(r"\.lora_([AB])\.[^.]+\.weight$", r".lora_\1.weight", key)
    return re.sub(r"\.lora_embedding_([AB])\.[^.]+$", r".lora_embedding_\1", key)


def _normalised(raw: Mapping[str, torch.Tensor], config: LoraConfig, file: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    adapted = {key.rsplit(".lora_", 1)[0] for key in map(_normal_key, raw) if key and ".lora_" in key}
    strange = []
    for key, value in raw.items():
        plain = _normal_key(key)
        if plain is None:
            continue
        if plain in tensors and torch.equal(tensors[plain], value):
            continue  # PEFT writes the bias of a module saved whole twice with bias "all"
        if plain in tensors:
            raise AdapterError(f"{file}: two tensors mean {plain}; save the adapter anew, one adapter a directory")
        if not _understood(plain, config, adapted):
            strange.append(key)
        tensors[plain] = value
    if strange:
        raise AdapterError(
            f"{file}: {len(strange)} keys are no part of the adapter that {CONFIG} describes: {listed(strange)}; "
            "they would be lost without a word, so save the adapter anew"
        )
    if not adapted:
        raise AdapterError(f"{file} holds no lora_A and lora_B tensors; save the adapter anew, from a trained model")
    _check_pairs(tensors, config, adapted, file)
    _check_values(tensors, str(file))
    return tensors


def _understood(key: str, config: LoraConfig, adapted: set[str]) -> bool:
    path, _, name = key.rpartition(".")
    if re.search(r"\.(lora_[AB]\.weight|lora_embedding_[AB])$", key):
        return True
    if ".lora_" in key:
        return False
    if name == "bias" and config.bias != "none" and (config.bias == "all" or path in adapted):
        return True
    if name == "weight" and path.rsplit(".", 1)[-1] in _EMBEDDINGS:
        return True  # save_embedding_layers writes the base's own; attaching checks that it is the base's
    parts = path.split(".")
    owners = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(owner.endswith(saved) for owner in owners for saved in config.modules_to_save or ())


def _check_pairs(tensors: Mapping[str, torch.Tensor], config: LoraConfig, adapted: set[str], file: Path) -> None:
    for path in sorted(adapted):
        kind = "lora_embedding_{}" if f"{path}.lora_embedding_A" in tensors else "lora_{}.weight"
        keys = [f"{path}.{kind.format(side)}" for side in "AB"]
        missing = [key for key in keys if key not in tensors]
        if missing:
            raise AdapterError(f"{file}: {listed(missing)} is missing; copy the adapter again, whole")
        a, b = (tensors[key] for key in keys)
        rank = config.rank_of(path)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise AdapterError(
                f"{file}: {path} has A {list(a.shape)} and B {list(b.shape)}, but {CONFIG} gives it rank {rank}; "
                "the two files are not of one adapter"
            )


def _check_values(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    for key, value in tensors.items():
        if not value.is_floating_point():
            raise AdapterError(f"{where}: {key} is {value.dtype}, not floating point; save the adapter anew")
        if not bool(torch.isfinite(value).all()):
            raise AdapterError(f"{where}: {key} holds NaN or infinite values; the adapter is broken, train it again")


def _resolved(adapter: Adapter) -> LoraConfig:
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
        changes["modules_to_save"] = tuple(sorted(saved | set(_saved_modules(config, adapter.tensors))))
    return LoraConfig(**(config.model_dump() | changes)) if changes else config


def _own_part(file: Path) -> dict[str, Any]:
    own = _read_json(file)
    if own.get("format") != FORMAT:
        raise AdapterError(
            f"{file}: format {own.get('format')!r} is not the known {FORMAT}; it needs another version of postil"
        )
    for field, kind in (("base", dict), ("base_name", str), ("config", dict), ("card", dict)):
        if not isinstance(own.get(field), kind):
            raise AdapterError(f"{file}: {field!r} is missing or of the wrong type; save the adapter anew")
    return own


def _own_config(values: Any, peft: LoraConfig, path: Path) -> LoraConfig:
    """postil's own configuration. Raises AdapterError where PEFT's file, edited since, says something else."""
    try:
        config: LoraConfig = LoraConfig.parse(values)
    except AdapterError as problem:
        raise AdapterError(f"{path / OWN}: {problem}") from None
    for field in ("r", "alpha", "dropout", "use_rslora", "bias", "rank_pattern", "alpha_pattern"):
        here, there = getattr(config, field), getattr(peft, field)
        if here != there:
            raise AdapterError(
                f"{path}: {OWN} says {field} = {here!r} but {CONFIG} says {there!r}; "
                f"make them equal, or remove {OWN} to trust {CONFIG}"
            )
    return config
