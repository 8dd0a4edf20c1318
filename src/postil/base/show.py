"""What `postil base show` prints, as data: a base's facts from its files, without loading it."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from postil.base import catalog
from postil.base.fingerprint import NF4, base_source
from postil.base.gguf import check_gguf
from postil.base.stored import nf4_weights, plain_tensors, read_config, stored_tensors
from postil.errors import BaseModelError, listed, nearest

_CONTEXT = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")


def show(source: str | Path) -> dict[str, Any]:
    """Facts about a known base (fetched or not), a model directory or a GGUF file.

    Keys: name, present, directory and, where known, summary, licence, source, parameters (a count),
    bytes, dtypes, context (tokens), architecture, layers, hidden, vocabulary, chat_template, fingerprint.
    Raises BaseModelError when the source is none of these, or its files are broken.
    """
    name = str(source)
    if name in catalog.names():
        entry, directory = catalog.entry_of(name), catalog.directory_of(name)
        facts: dict[str, Any] = {
            "name": name,
            "present": catalog.present(name),
            "directory": str(directory),
            "summary": entry.summary,
            "licence": entry.licence,
            "made_by": entry.made_by,
            "source": entry.source,
            "parameters": entry.parameters,
            "context": entry.context,
            "download_bytes": entry.download_bytes,
            "pinned": entry.fingerprint,
        }
        return facts | (_of_directory(directory) if facts["present"] else {})
    path = Path(source).expanduser()
    if path.suffix.lower() == ".gguf":
        check_gguf(path)
        return {"name": name, "present": True, "directory": str(path.parent), "bytes": path.stat().st_size}
    if not path.exists():
        raise BaseModelError(
            f"{name!r} is no directory here and no known base{nearest(name, catalog.names())}; "
            f"known: {listed(catalog.names())}."
        )
    return {"name": name, "present": True, "directory": str(path)} | _of_directory(path)


def _of_directory(directory: Path) -> dict[str, Any]:
    config, tensors = read_config(directory), stored_tensors(directory)
    sizes: Counter[str] = Counter()
    for tensor in plain_tensors(tensors):
        sizes[tensor.dtype] += math.prod(tensor.shape)
    codes = {tensor.name: tensor for tensor in tensors}
    for name in nf4_weights(tensors):
        sizes[NF4] += 2 * (codes[name].end - codes[name].begin)  # two codes a byte
    return {
        "architecture": config.get("model_type"),
        "parameters": sum(sizes.values()),
        "bytes": sum(tensor.end - tensor.begin for tensor in tensors),
        "dtypes": dict(sizes),
        "context": next((config[key] for key in _CONTEXT if key in config), None),
        "layers": config.get("num_hidden_layers", config.get("n_layer")),
        "hidden": config.get("hidden_size", config.get("n_embd")),
        "vocabulary": config.get("vocab_size"),
        "chat_template": (directory / "chat_template.jinja").is_file(),
        "fingerprint": base_source(directory),
    }
