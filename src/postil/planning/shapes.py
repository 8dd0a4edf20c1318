"""The shape of a base to plan for: from a directory, a config.json, a known base's name, or a well-known size."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from postil.base import catalog
from postil.base.quiet import LOADING_ERRORS, first_line, quiet
from postil.base.stored import read_config, read_object, stored_tensors
from postil.base.support import check_supported
from postil.errors import BaseModelError, listed, nearest

_STORED = {"F64": "float32", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True, slots=True)
class Shape:
    """A base without its weights: `config` is transformers' configuration, `dtype` the weights' as stored.

    field: method → what tables of others say it takes, where they say so. nf4: its layers are stored in 4 bits.
    """

    name: str
    config: Any
    dtype: str
    field: dict[str, str] = dataclasses.field(default_factory=dict)
    nf4: bool = False


@functools.cache
def known_shapes() -> dict[str, dict[str, Any]]:
    """The well-known shapes of shapes.json: name → {"also": other names, "dtype", "config", "field"}."""
    text = resources.files("postil.planning").joinpath("shapes.json").read_text(encoding="utf-8")
    shapes: dict[str, dict[str, Any]] = json.loads(text)
    return shapes


def open_shape(base: str | Path) -> Shape:
    """The shape that `base` means; no weight is read.

    base: a model directory (its weights may be missing), the path of a config.json, a name of the catalog, or a
    well-known shape ("7B", "13B", "70B": Llama 2; "8B": Llama 3.1). Raises BaseModelError with the nearest name.
    """
    name = str(base)
    for known, entry in known_shapes().items():
        if name.lower() in (known, *entry["also"]):
            return Shape(known, _configuration(entry["config"], name), entry["dtype"], entry.get("field", {}))
    if name in catalog.names():
        return _of_catalog(name)
    path = Path(base).expanduser()
    if path.suffix.lower() == ".gguf":
        raise BaseModelError(f"{path} is a GGUF, whose shape is not read here; plan for its config.json instead")
    if path.is_file():
        return _of_config(name, path.parent, read_object(path), weights=False)
    if path.exists():
        return _of_config(name, path, read_config(path), weights=True)
    names = [*known_shapes(), *(other for entry in known_shapes().values() for other in entry["also"])]
    raise BaseModelError(
        f"{name!r} is no directory or config.json here, no known base and no known shape"
        f"{nearest(name, [*names, *catalog.names()])}; known: {listed([*catalog.names(), *known_shapes()], 12)}"
    )


def _of_catalog(name: str) -> Shape:
    entry = catalog.entry_of(name)
    if catalog.present(name):
        directory = catalog.directory_of(name)
        return _of_config(name, directory, read_config(directory), weights=True)
    if entry.config is None:
        raise BaseModelError(f"{name} is not here yet: fetch it with `postil base get {name}`")
    return Shape(name, _configuration(entry.config, name), entry.dtype)


def _of_config(name: str, directory: Path, config: dict[str, Any], *, weights: bool) -> Shape:
    check_supported(config, directory, trust_remote_code=False, nf4=True)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if weights and any(directory.glob("*.safetensors")):
        kinds = {_STORED[tensor.dtype] for tensor in stored_tensors(directory) if tensor.dtype in _STORED}
        if len(kinds) == 1:
            dtype = kinds.pop()
    fields = {key: value for key, value in config.items() if key != "quantization_config"}
    return Shape(name, _configuration(fields, name), dtype, nf4=bool(config.get("quantization_config")))


def _configuration(fields: dict[str, Any], name: str) -> Any:
    import transformers

    values = dict(fields)
    kind = values.pop("model_type", None)
    try:
        with quiet():
            return transformers.AutoConfig.for_model(kind, **values)
    except LOADING_ERRORS as error:
        raise BaseModelError(f"transformers cannot read the config of {name}: {first_line(error)}") from error
