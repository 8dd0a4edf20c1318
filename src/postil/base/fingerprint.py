"""Knows a base by its bytes: the source (config and tensors) and the numeric form it is held in."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch

from postil.base.cache import cache_directory
from postil.base.nf4_linear import nf4_layers
from postil.base.stored import SINGLE, StoredTensor, read_config, read_object, stored_tensors, weight_files
from postil.base.weights import HARMLESS
from postil.errors import BaseModelError
from postil.files import write_json

# Fields of config.json that may differ between two copies of the same base.
VOLATILE = frozenset(
    {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "_attn_implementation",
     "_attn_implementation_internal", "attn_implementation", "_commit_hash", "quantization_config"}
)  # fmt: skip
NF4 = "nf4"
RECORD = "postil.json"
FORMS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
_STORED_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
_CHUNK = 1 << 24  # bytes hashed at a time
_BEGINNING = 1 << 18  # bytes of a file that a quick check reads
PATIENCE = 10.0  # seconds that a process waits to write down what it hashed


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`source`: "sha256:…" over config and tensors, of the dense base where it is known; `form`: nf4 where layers are
    held in 4 bits, else bf16, fp16, fp32, … or mixed."""

    source: str
    form: str

    def __str__(self) -> str:
        return f"{self.source} ({self.form})"


def directory_source(directory: Path, *, verify: bool = False) -> str:
    """The source hash of a model directory, independent of sharding and file layout.

    A quick check (path, sizes, times, inodes and beginnings of the files) answers from the cache; `verify` hashes
    every byte anew. Raises BaseModelError when the directory is broken.
    """
    directory = directory.resolve()
    return _cached(directory, _stamps(directory), verify, lambda: compute_source(directory))


def compute_source(directory: Path) -> str:
    """The source hash of a model directory from all its bytes, past the cache."""
    return _digest(canonical_config(read_config(directory)), _stored_fields(stored_tensors(directory)))


def base_source(directory: Path, *, verify: bool = False) -> str:
    """The source of the base in a directory: for one that `postil quantize` wrote that of the dense base, else
    `directory_source`. Raises BaseModelError where the 4-bit weights are not those that it wrote."""
    own = directory_source(directory, verify=verify)
    record = read_object(directory / RECORD).get("quantised") if (directory / RECORD).is_file() else None
    if not isinstance(record, dict):
        return own
    if record.get("digest") != own:
        raise BaseModelError(
            f"{directory} holds other weights or settings than `postil quantize` wrote ({RECORD}): quantise the "
            "base again."
        )
    return str(record.get("source"))


def gguf_source(file: Path, *, verify: bool = False) -> str:
    """The source hash of a GGUF file: its whole bytes, since it is one file that carries its config."""
    file = file.resolve()

    def compute() -> str:
        with open(file, "rb") as handle:
            return f"sha256:{hashlib.file_digest(handle, 'sha256').hexdigest()}"

    return _cached(file, {file.name: _stamp(file)}, verify, compute)


def live_source(model: Any) -> str:
    """The source hash of a model in memory, equal to that of the directory save_pretrained would write.

    `model`: a PreTrainedModel. Buffers that are not saved are left out; tied tensors count once.
    """
    config = json.loads(model.config.to_json_string(use_diff=True))
    config["architectures"] = [type(model).__name__]
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return _digest(
        canonical_config(config),
        ((name, _stored_name(state[name]), tuple(state[name].shape), _tensor_sha256(state[name]))
         for name in sorted(state)),
    )  # fmt: skip


def holds_stored(model: Any, directory: Path) -> bool:
    """Whether every weight of a model in memory is the one that `directory` stores, in the model's own dtypes.

    `model`: a PreTrainedModel. Stored names may lack the prefix of the inner model (GPT-2); a name that is not
    stored must be tied to one that is. The first difference ends the comparison. Raises BaseModelError when the
    directory is broken.
    """
    live: dict[str, torch.Tensor] = model.state_dict()
    prefix = f"{model.base_model_prefix}."
    seen: set[int] = set()
    for tensor in stored_tensors(directory):
        found = live.get(tensor.name, live.get(prefix + tensor.name))
        if found is None and tensor.name.endswith(HARMLESS):
            continue
        if found is None or tuple(found.shape) != tensor.shape or not _same(tensor, found):
            return False
        seen.add(found.data_ptr())
    return all(tensor.data_ptr() in seen for tensor in live.values())


def _same(stored: StoredTensor, live: torch.Tensor) -> bool:
    """Whether the live tensor is the stored one, or what casting it to the live dtype gives, bit for bit."""
    dtype = next((dtype for dtype, name in _STORED_NAMES.items() if name == stored.dtype), None)
    if dtype is None:
        return False
    if dtype != live.dtype and live.numel():
        raw = torch.from_file(str(stored.file), size=stored.file.stat().st_size, dtype=torch.uint8)
        live = live.detach().cpu()
        return torch.equal(raw[stored.begin : stored.end].clone().view(dtype).view(stored.shape).to(live.dtype), live)
    return next(_stored_fields([stored]))[3] == _tensor_sha256(live)


def numeric_form(model: torch.nn.Module) -> str:
    """nf4 where layers are 4-bit; bf16, fp16, fp32 … when all floating parameters share a dtype, else `mixed`."""
    if next(nf4_layers(model), None) is not None:
        return NF4
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if len(kinds) != 1:
        return "mixed"
    kind = kinds.pop()
    return FORMS.get(kind, str(kind).removeprefix("torch."))


def live_digest(model: torch.nn.Module) -> str:
    """SHA-256 (hex) over name, dtype, shape and bytes of every live parameter and buffer, tied ones once.

    Equal before and after means: the base is bit for bit as it was.
    """
    digest = hashlib.sha256()
    # named_parameters and named_buffers drop the second name of a tied tensor.
    live: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in sorted(live):
        tensor = live[name]
        _frame(digest, name, str(tensor.dtype), str(tuple(tensor.shape)), _tensor_sha256(tensor))
    return digest.hexdigest()


def canonical_config(config: dict[str, Any]) -> str:
    """The configuration as text that two copies of the same base share: sorted, without volatile fields."""
    return json.dumps(_without_volatile(config), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_volatile(inner) for key, inner in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [_without_volatile(inner) for inner in value]
    return value


def _digest(config: str, tensors: Iterable[tuple[str, str, tuple[int, ...], str]]) -> str:
    digest = hashlib.sha256()
    _frame(digest, "postil base 1", config)
    for name, dtype, shape, content in tensors:
        _frame(digest, name, dtype, json.dumps(list(shape)), content)
    return f"sha256:{digest.hexdigest()}"


def _frame(digest: Any, *fields: str) -> None:
    """Add fields with their lengths, so that no two lists of fields give the same bytes."""
    for field in fields:
        raw = field.encode("utf-8")
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)


def _stored_fields(tensors: list[StoredTensor]) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """(name, dtype, shape, sha256 of bytes) by name, each file mapped once."""
    maps: dict[Path, mmap.mmap] = {}
    try:
        for tensor in tensors:
            if tensor.file not in maps:
                with open(tensor.file, "rb") as handle:
                    maps[tensor.file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            content = hashlib.sha256()
            with memoryview(maps[tensor.file]) as view:
                for begin in range(tensor.begin, tensor.end, _CHUNK):
                    with view[begin : min(begin + _CHUNK, tensor.end)] as piece:
                        content.update(piece)
            yield tensor.name, tensor.dtype, tensor.shape, content.hexdigest()
    finally:
        for mapped in maps.values():
            mapped.close()


def _stored_name(tensor: torch.Tensor) -> str:
    return _STORED_NAMES.get(tensor.dtype, str(tensor.dtype))


def _tensor_sha256(tensor: torch.Tensor) -> str:
    if tensor.device.type == "meta":
        raise BaseModelError("The model has tensors without bytes (meta device): load its weights first.")
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _stamp(file: Path) -> list[int | str]:
    """What changes with a file's bytes: size, times, inode, and its beginning (of weights: the header). The time of
    modification alone can be given back (rsync -a, cp -p, tar), that of the last change to the inode cannot."""
    try:
        status = file.stat()
        with open(file, "rb") as handle:
            beginning = hashlib.sha256(handle.read(_BEGINNING)).hexdigest()
    except OSError as error:
        raise BaseModelError(f"{file} cannot be read ({error.strerror}).") from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, beginning]


def _stamps(directory: Path) -> dict[str, list[int | str]]:
    files = [directory / "config.json", *weight_files(directory)]
    if files[-1].name != SINGLE:
        files.append(directory / "model.safetensors.index.json")
    if not files[0].is_file():
        read_config(directory)
    return {file.name: _stamp(file) for file in files}


def _cached(path: Path, stamps: dict[str, list[int | str]], verify: bool, compute: Callable[[], str]) -> str:
    """The source of `path`, from `<cache>/fingerprints.json` when what _stamp knows of its files still fits."""
    store = cache_directory() / "fingerprints.json"
    entry = _known(store).get(str(path))
    if not verify and isinstance(entry, dict) and entry.get("files") == stamps:
        return str(entry["source"])
    source = compute()
    with suppress(OSError):  # a cache that cannot be written only costs time
        store.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(store.with_suffix(".lock"), timeout=PATIENCE):
            write_json(store, _known(store) | {str(path): {"files": stamps, "source": source}})
    return source


def _known(store: Path) -> dict[str, Any]:
    try:
        known = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
