"""Adapter directories on disk: PEFT 0.21.2's LoRA files plus postil.json, written atomically, read strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from postil.adapter.adapter import Adapter
from postil.adapter.config import LoraConfig
from postil.adapter.peft_config import PEFT_VERSION, check_fields, from_peft, resolved, to_peft, whole
from postil.adapter.peft_keys import check_values, normalised, peft_key
from postil.errors import AdapterError, listed
from postil.files import atomic_directory

FORMAT = 1  # of postil.json
CONFIG, WEIGHTS, CARD, OWN = "adapter_config.json", "adapter_model.safetensors", "README.md", "postil.json"
VERSION = "version.json"  # lies beside an adapter in a registry (postil.registry.version)


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
    check_values(adapter.tensors, "this adapter")
    modules = set(adapter.modules)
    # a clone each: tensors that share memory (fused A) are refused by safetensors
    tensors = {
        peft_key(key, modules): value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in sorted(adapter.tensors.items())
    }
    with atomic_directory(target, marker=OWN, carry=True) as temporary:
        _write(temporary / CONFIG, _json(to_peft(adapter)))
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
    check_fields(peft, path / CONFIG)
    return peft


def assembled(path: Path, peft: Mapping[str, Any], raw: Mapping[str, torch.Tensor], weights: Path) -> Adapter:
    """The adapter in the directory `path` from its configuration and the tensors read from `weights`."""
    config = from_peft(peft, path / CONFIG)
    tensors = normalised(raw, config, weights)
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
        adapter.config = resolved(adapter)
    return adapter


# -- writing --------------------------------------------------------------------------------------------


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
        f"{adapter.base_name or 'its base model'}, r = {config.r}, alpha = {whole(config.alpha)}.",
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
