"""Opens a GGUF file as a dense transformers model, and mends what transformers' loader loses."""

from __future__ import annotations

import errno
import functools
import importlib.util
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from postil.base.quiet import LOADING_ERRORS, first_line, quiet
from postil.errors import BaseModelError

# `tokenizer.ggml.pre` names whose text is cut at every single digit before the byte-level cut of GPT-2
# (the StarCoder family; SmolLM's own tokenizer.json has Digits(individual_digits=True) + ByteLevel).
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva"})


def check_gguf(file: Path) -> Any:
    """A gguf.GGUFReader of `file`; BaseModelError unless it is whole: magic, header, room for its tensors."""
    if not file.is_file():
        raise BaseModelError(f"{file} does not exist: give a GGUF file that does.")
    with open(file, "rb") as handle:
        if handle.read(4) != b"GGUF":
            raise BaseModelError(f"{file} is no GGUF file (its first bytes are not 'GGUF').")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except (ValueError, LookupError, OSError, OverflowError, TypeError, struct.error) as error:
        raise BaseModelError(
            f"{file} is truncated or corrupt (its header cannot be read): download it again."
        ) from error
    if not reader.tensors or end > file.stat().st_size:
        raise BaseModelError(
            f"{file} is truncated or corrupt (its tensors end at byte {end} of {file.stat().st_size}): "
            "download it again."
        )
    return reader


def load_gguf(file: Path) -> tuple[Any, Any, dict[str, Any]]:
    """(model, tokenizer, loading info) of a GGUF file: dense float32 weights on the CPU.

    The weights are dequantised in float32 and rounded by the caller once, if at all. Raises
    BaseModelError when the file is broken or of a kind that transformers cannot read.
    """
    reader = check_gguf(file)
    if importlib.util.find_spec("accelerate") is None:
        raise BaseModelError(f"Reading {file.name} needs accelerate: run `pip install accelerate`.")
    import transformers

    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.float32, "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):
        # Newer versions may leave the weights packed in a module of their own when a kernel is installed.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with quiet(), _no_bar():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), **options)
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    except LOADING_ERRORS as error:
        raise BaseModelError(f"transformers cannot load {file}: {first_line(error)}") from error
    _mend_config(model)
    _mend_tokenizer(tokenizer, reader, getattr(model.config, "max_position_embeddings", None))
    return model, tokenizer, info


@contextmanager
def _no_bar() -> Iterator[None]:
    """The dequantising bar is tqdm's own and heeds no switch of transformers: turn it off by name."""
    from transformers import modeling_gguf_pytorch_utils as legacy

    bar = getattr(legacy, "tqdm", None)
    if bar is None:
        yield
        return
    legacy.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        legacy.tqdm = bar


def _mend_config(model: Any) -> None:
    """Make the loaded model an ordinary one: not quantised, exact settings, no stray fields.

    transformers leaves quantization_config and the quantizer on a dequantised model (so it refuses to
    save or cast it), keeps the file's title as a field, and reads 1e-5 as its float32 neighbour
    9.999999747378752e-06.
    """
    config = model.config
    for stray in ("quantization_config", "_model_name_or_path", "unk_token_id"):
        if hasattr(config, stray):
            delattr(config, stray)
    for field in ("hf_quantizer", "quantization_method"):
        if getattr(model, field, None) is not None:
            setattr(model, field, None)
    model.is_quantized = False
    for name, value in list(vars(config).items()):
        if isinstance(value, float):
            setattr(config, name, _shortest(value))


def _shortest(value: float) -> float:
    """The decimal that was meant: the shortest one with the same float32, if the value is a float32."""
    narrow = np.float32(value)
    return float(str(narrow)) if float(narrow) == value and np.isfinite(narrow) else value


def _mend_tokenizer(tokenizer: Any, reader: Any, context: int | None) -> None:
    """Restore the cut at single digits, which transformers drops for SmolLM's family, and the length.

    Without it "\\n\\n7" and "  7" become other tokens than those the model was trained on: the byte-level
    cut alone splits the white space before a digit, where the digit's own cut keeps it whole.
    """
    from tokenizers import pre_tokenizers

    if context is not None:
        tokenizer.model_max_length = context
    kind, cut = (reader.get_field(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    byte_level = kind is not None and kind.contents() == "gpt2"
    if byte_level and cut is not None and cut.contents() in _SINGLE_DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )


def write_directory(
    model: Any,
    tokenizer: Any,
    directory: Path,
    *,
    dtype: torch.dtype,
    config: dict[str, Any] | None = None,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a model as an HF directory that plain transformers loads; the same bytes from the same tensors.

    `config`: what config.json says (default: the model's own, without the version of transformers).
    `state`: the tensors as they are to lie there (default: the model's, in `dtype`). Tied tensors are written once.
    `directory` must exist. Raises OSError when the system refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if state is None:
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        state = {
            name: tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
            for name, tensor in model.state_dict().items()
            if name not in tied
        }
    try:
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # how safetensors says that the disk is full
        raise OSError(errno.EIO, first_line(error)) from error
    _dump(directory / "config.json", config or config_of(model, dtype))
    generation = model.generation_config.to_diff_dict() if model.generation_config is not None else {}
    for volatile in ("transformers_version", "_from_model_config"):
        generation.pop(volatile, None)
    _dump(directory / "generation_config.json", generation)
    with quiet():
        tokenizer.save_pretrained(str(directory))
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    for volatile in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(volatile, None)
    _dump(directory / "tokenizer_config.json", settings)
    # safetensors creates its file for the owner alone; a base is as readable as its config.
    (directory / "model.safetensors").chmod((directory / "config.json").stat().st_mode)


def config_of(model: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of a model whose weights are stored in `dtype`."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("transformers_version", None)
    return config


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
