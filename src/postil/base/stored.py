"""Reads what a model directory stores, before a byte of it is trusted: config, headers, shards."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from postil.errors import BaseModelError, listed

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2,
    "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
# What bitsandbytes stores beside the codes of a 4-bit weight X: X.absmax and so on; the last says the kind.
NF4_STATE = ".quant_state.bitsandbytes__nf4"
NF4_COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", NF4_STATE)
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of one safetensors file: its bytes are `file[begin:end]`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


def read_config(directory: Path) -> dict[str, Any]:
    """The parsed config.json of a model directory.

    Raises BaseModelError when the directory is missing or empty, or the file missing or no JSON object.
    """
    if not directory.exists():
        raise BaseModelError(f"{directory} does not exist: give a model directory that does.")
    if not directory.is_dir():
        raise BaseModelError(f"{directory} is a file, not a model directory: give its directory.")
    if not any(directory.iterdir()):
        raise BaseModelError(f"{directory} is empty: it needs config.json, weights and a tokenizer.")
    path = directory / "config.json"
    if not path.is_file():
        hint = ""
        if (directory / "adapter_config.json").is_file():
            hint = "; it is an adapter (adapter_config.json): load its base and give it as the adapter"
        raise BaseModelError(f"{directory} has no config.json, so it is no model directory{hint}.")
    return read_object(path)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; BaseModelError names the file and the place otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise BaseModelError(f"{path} is not UTF-8 text (byte {error.start}): download it again.") from error
    except json.JSONDecodeError as error:
        raise BaseModelError(
            f"{path} is not valid JSON (line {error.lineno}: {error.msg}): it may be cut off, download it again."
        ) from error
    except OSError as error:
        raise BaseModelError(f"{path} cannot be read ({error.strerror}).") from error
    if not isinstance(value, dict):
        raise BaseModelError(f"{path} holds a JSON {type(value).__name__}, not an object: download it again.")
    return value


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that transformers would load from `directory`, in order of name.

    Raises BaseModelError when there are none (pickled weights are named with the mend), or when the
    index names a shard that is not there.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.is_file():
        return [single]
    if not index.is_file():
        return _refuse_no_weights(directory)
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BaseModelError(f"{index} has no weight_map: download it again.")
    names = sorted({str(name) for name in weight_map.values()})
    strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if strange:
        raise BaseModelError(f"{index} names {strange[0]!r}, which is no safetensors file beside it.")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise BaseModelError(
            f"{directory} lacks {len(missing)} of {len(names)} weight files that {INDEX} names: "
            f"{listed(missing)}; download them again."
        )
    return [directory / name for name in names]


def _refuse_no_weights(directory: Path) -> list[Path]:
    pickled = sorted(path.name for path in directory.glob("*.bin")) + sorted(
        path.name for pattern in ("*.pt", "*.pth", "*.ckpt") for path in directory.glob(pattern)
    )
    if pickled:
        raise BaseModelError(
            f"{directory} has only pickled weights ({listed(pickled)}), which can run code when read: "
            "convert to safetensors."
        )
    gguf = sorted(directory.glob("*.gguf"))
    if gguf:
        raise BaseModelError(f"{directory} has no safetensors weights; name the GGUF file itself: {gguf[0]}.")
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        raise BaseModelError(
            f"{directory} has {listed(others)} but neither {SINGLE} nor {INDEX}: download the directory again, whole."
        )
    raise BaseModelError(f"{directory} has no weights ({SINGLE}): download it again, whole.")


def stored_tensors(directory: Path) -> list[StoredTensor]:
    """Every tensor that `directory` stores, sorted by name; the headers are checked against the files.

    Raises BaseModelError naming the file that is truncated or corrupt, or a tensor stored twice.
    """
    tensors = [tensor for file in weight_files(directory) for tensor in read_header(file)]
    tensors.sort(key=lambda tensor: tensor.name)
    for before, after in itertools.pairwise(tensors):
        if before.name == after.name:
            raise BaseModelError(
                f"{after.name} is stored twice, in {before.file.name} and {after.file.name} "
                f"of {directory}: download it again."
            )
    index = directory / INDEX
    if not (directory / SINGLE).is_file():
        absent = sorted(set(read_object(index)["weight_map"]) - {tensor.name for tensor in tensors})
        if absent:
            raise BaseModelError(
                f"{index} names tensors that no weight file holds: {listed(absent)}; download them again."
            )
    return tensors


def read_tensor(tensor: StoredTensor) -> torch.Tensor:
    """A stored tensor's values, in the dtype and shape that they are stored in. Raises OSError, SafetensorError."""
    from safetensors import safe_open

    with safe_open(tensor.file, framework="pt") as file:
        values: torch.Tensor = file.get_tensor(tensor.name)
    return values


def nf4_weights(tensors: list[StoredTensor]) -> list[str]:
    """The names of the weights that are stored in NF4, as bitsandbytes does."""
    return [tensor.name.removesuffix(NF4_STATE) for tensor in tensors if tensor.name.endswith(NF4_STATE)]


def plain_tensors(tensors: list[StoredTensor]) -> list[StoredTensor]:
    """The tensors that are no part of a weight stored in NF4."""
    weights = nf4_weights(tensors)
    parts = {weight + end for weight in weights for end in ("", *NF4_COMPANIONS)}
    return [tensor for tensor in tensors if tensor.name not in parts]


def read_header(file: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in file order, from its header alone.

    Format: 8 bytes little-endian length N, N bytes of JSON, then the tensors' bytes without gaps.
    Raises BaseModelError, naming the file, when the header or the file's size does not hold together.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise _corrupt(file, f"its header wants {length} bytes, the file has {size}")
            raw = handle.read(length)
    except OSError as error:
        raise BaseModelError(f"{file} cannot be read ({error.strerror}).") from error
    try:
        header = json.loads(raw)
        entries = {name: value for name, value in header.items() if name != "__metadata__"}
        start = 8 + length
        tensors = [
            StoredTensor(
                name, str(value["dtype"]), tuple(int(n) for n in value["shape"]), file,
                start + int(value["data_offsets"][0]), start + int(value["data_offsets"][1]),
            )
            for name, value in entries.items()
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise _corrupt(file, "its header cannot be read") from error
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    position = start
    for tensor in tensors:
        item = BYTES.get(tensor.dtype)
        wanted = None if item is None else item * math.prod(tensor.shape)
        if tensor.begin != position or (wanted is not None and tensor.end - tensor.begin != wanted):
            raise _corrupt(file, f"the place of {tensor.name} does not fit its shape")
        position = tensor.end
    if position != size:
        kind = "is cut off" if size < position else "has bytes left over"
        raise _corrupt(file, f"it {kind}: {size} bytes where its header names {position}")
    return tensors


def _corrupt(file: Path, what: str) -> BaseModelError:
    return BaseModelError(f"{file} is truncated or corrupt ({what}): download it again.")
