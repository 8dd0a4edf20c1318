"""Opens a base: any source in, a frozen model with owned weights, its tokenizer and its fingerprint out."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from postil.base import catalog, hub
from postil.base.fingerprint import (
    NF4,
    Fingerprint,
    base_source,
    gguf_source,
    holds_stored,
    live_source,
    numeric_form,
)
from postil.base.gguf import load_gguf
from postil.base.quiet import LOADING_ERRORS, first_line, quiet
from postil.base.stored import StoredTensor, nf4_weights, plain_tensors, read_config, read_object, stored_tensors
from postil.base.support import check_supported, refuse_code
from postil.base.weights import check_finite, check_keys, own_weights
from postil.errors import BaseModelError, PostilError, listed, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
NEARLY_ALL = 0.99  # of the stored values
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json"
)  # fmt: skip


@dataclass(slots=True)
class Base:
    """An opened base: `model` (a PreTrainedModel in eval mode, every weight frozen) and its `tokenizer`.

    `tokenizer`: a fast one, or None for a model that the user loaded. `source`: what the user named.
    `directory`: the HF directory it was read from, if any; `file`: the GGUF file, if any. `as_stored`: whether
    the weights are known to be those of the directory or file: postil read them and has not changed them.
    """

    model: Any
    tokenizer: Any
    source: str
    directory: Path | None = None
    file: Path | None = None
    as_stored: bool = True
    _form: str = field(default="", repr=False)
    _source_hash: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._form = numeric_form(self.model)  # before an adapter brings parameters of another dtype

    @property
    def config(self) -> Any:
        """The model's own configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        device: torch.device = next(iter(self.model.parameters())).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights (of the embedding, where they are mixed)."""
        weight: torch.Tensor = self.model.get_input_embeddings().weight
        return weight.dtype

    @property
    def quantised(self) -> bool:
        """Whether layers are held in 4 bits (NF4)."""
        return self._form == NF4

    @property
    def context(self) -> int | None:
        """The longest sequence in tokens, or None where the model sets no limit."""
        return _context_of(self.config)

    @property
    def architecture(self) -> str:
        """The model's kind as transformers names it: llama, gpt2, …"""
        return str(self.config.model_type)

    def fingerprint(self, *, verify: bool = False) -> Fingerprint:
        """What this base is, by its bytes; computed once. `verify`: hash every byte anew.

        The directory's or file's where the weights are as stored there, else that of the weights in memory. A 4-bit
        base has the source of the dense one that it was made from: quantised while loading, or by `postil quantize`;
        of a 4-bit directory made elsewhere it is the directory's own. Raises BaseModelError where what `postil
        quantize` wrote was changed since.
        """
        if self._source_hash is None or verify:
            if self.as_stored and self.file is not None:
                self._source_hash = gguf_source(self.file, verify=verify)
            elif self.directory is not None and (self.as_stored or holds_stored(self.model, self.directory)):
                self._source_hash = base_source(self.directory, verify=verify)
            else:
                self._source_hash = live_source(self.model)
        return Fingerprint(self._source_hash, self._form)

    def changed(self) -> None:
        """To be called after the weights in memory changed (full fine-tuning): the fingerprint is taken anew."""
        self.as_stored, self._source_hash = False, None
        self._form = numeric_form(self.model)


def load_base(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    quant: str | None = None,
) -> Base:
    """Open a base and freeze it.

    source: an HF model directory, a `.gguf` file, a name of the catalog, or a hub name (owner/name).
    dtype: "auto" (as nearly all values are stored, or the widest of a directory that mixes them; float32 for
    GGUF), "float32", "bfloat16" or "float16". device: "cpu", "cuda", "cuda:N", or "auto" (cuda when there is one).
    trust_remote_code: let a model directory run code of its own. quant: "nf4" holds the linear layers within the
    decoder in 4 bits, each tensor quantised as it is read, so that no more than the 4-bit base and one layer is ever
    in memory (a GGUF is read dense first); dtype is then that of all else and of the products. A directory of 4-bit
    weights by bitsandbytes (nf4) opens as it is, with or without. Raises BaseModelError with one sentence for
    everything that is missing, broken or of an unsupported kind.
    """
    wanted, place, nf4 = _dtype_of(dtype), device_of(device), _quant_of(quant)
    name = str(source)
    path = Path(source).expanduser()
    if isinstance(source, str) and source in catalog.names():
        return _open_directory(catalog.fetch(source), name, wanted, place, trust_remote_code, nf4)
    if path.suffix.lower() == ".gguf":
        return _open_gguf(path, name, wanted, place, nf4)
    if not path.exists() and isinstance(source, str):
        path = _resolve_missing(source, path, code=trust_remote_code)
    return _open_directory(path, name, wanted, place, trust_remote_code, nf4)


def open_tokenizer(directory: Path) -> tuple[Any, int | None]:
    """The tokenizer and the context of a model directory, its weights left alone. Raises as load_base does."""
    import transformers

    config = read_config(directory)
    refuse_code(directory, _configs_with_code(directory, config))
    check_supported(config, directory, trust_remote_code=False, nf4=True)
    try:
        with quiet():
            settings = transformers.AutoConfig.from_pretrained(str(directory), local_files_only=True)
    except LOADING_ERRORS as error:
        raise BaseModelError(f"transformers cannot read the config of {directory}: {first_line(error)}") from error
    return _load_tokenizer(directory, False), _context_of(settings)


def base_from_model(model: Any, tokenizer: Any = None) -> Base:
    """A Base around a PreTrainedModel that the user has loaded; its weights are frozen in place.

    Its fingerprint is that of the directory it came from only where the weights are still those stored there.
    Raises BaseModelError for the kinds that load_base refuses (recurrent, encoder-decoder, quantised).
    """
    name = str(getattr(model.config, "_name_or_path", "") or "")
    check_supported(model.config.to_dict(), Path(name or type(model).__name__), trust_remote_code=True)
    freeze(model)
    directory = Path(name) if name and (Path(name) / "config.json").is_file() else None
    if directory is None and name:
        directory = hub.cached(name, getattr(model.config, "_commit_hash", None))
    return Base(model, tokenizer, name or type(model).__name__, directory, as_stored=False)


def freeze(model: torch.nn.Module) -> None:
    """No gradient for any weight, and eval mode: a base never changes and never drops out."""
    model.requires_grad_(False)
    model.eval()


def device_of(device: str) -> torch.device:
    """The device named "cpu", "cuda", "cuda:N" or "auto"; BaseModelError where this machine lacks it."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (":" in device and not (kind == "cuda" and number.isdecimal())):
        hint = nearest(device, ("cpu", "cuda", "auto"))
        raise BaseModelError(f"{device!r} is no device{hint}: give cpu, cuda, cuda:N or auto.")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise BaseModelError(f"{device} is not available on this machine: use cpu (or auto).")
        if number and int(number) >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise BaseModelError(f"{device} does not exist: this machine has {count} GPU(s), from cuda:0 on.")
    return torch.device(device)


def _dtype_of(dtype: str) -> torch.dtype | None:
    if dtype == "auto":
        return None
    if dtype not in DTYPES:
        known = ("auto", *DTYPES)
        hint = nearest(dtype, known)
        raise BaseModelError(f"{dtype!r} is no dtype for a base{hint}: give {', '.join(known)}.")
    return DTYPES[dtype]


def _quant_of(quant: str | None) -> bool:
    if quant not in (None, NF4):
        raise BaseModelError(f"{quant!r} is no 4-bit form of a base{nearest(quant, (NF4,))}: give nf4, or nothing.")
    return quant == NF4


def _resolve_missing(source: str, path: Path, *, code: bool) -> Path:
    """A source that is no path here: the hub's, when it reads owner/name; else say what was missing."""
    if hub.is_hub_name(source):
        return hub.download(source, code=code)
    if "/" in source or "\\" in source or source.startswith(("~", ".")):
        near = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise BaseModelError(f"{source} does not exist{near}: give a model directory that does.")
    raise BaseModelError(
        f"{source!r} is no directory here and no known base{nearest(source, catalog.names())}; "
        f"known: {listed(catalog.names())}; a hub name reads owner/name."
    )


def _open_gguf(file: Path, name: str, dtype: torch.dtype | None, device: torch.device, nf4: bool) -> Base:
    model, tokenizer, info = load_gguf(file)
    check_supported(model.config.to_dict(), file, trust_remote_code=False)
    check_keys(info, file)
    kind = dtype or torch.float32
    for parameter in model.parameters():  # not model.to: it would round the rotary frequencies as well
        parameter.data = parameter.data.to(kind)
    model.config.dtype = kind
    if nf4:
        from postil.base.quantise import quantise_model

        quantise_model(model)
    return _finish(model, tokenizer, name, file, device, file=file)


def _open_directory(
    directory: Path, name: str, dtype: torch.dtype | None, device: torch.device, trust_remote_code: bool, nf4: bool
) -> Base:
    """Every check that needs no loading, then transformers' own loaders, then the weights' checks."""
    config = read_config(directory)
    if not trust_remote_code:
        refuse_code(directory, _configs_with_code(directory, config))
    check_supported(config, directory, trust_remote_code=trust_remote_code, nf4=True)
    tensors = stored_tensors(directory)
    stored_so = config.get("quantization_config") is not None
    if stored_so and not nf4_weights(tensors):
        raise BaseModelError(
            f"{directory} stores no 4-bit weight, though its config.json says so: download it again, whole."
        )
    chosen = dtype or _stored_dtype(tensors, directory)
    tokenizer = _load_tokenizer(directory, trust_remote_code)
    try:
        with quiet():
            if nf4 or stored_so:
                from postil.base.nf4_loader import load_nf4

                model, info = load_nf4(directory, tensors, chosen, trust_remote_code=trust_remote_code)
            else:
                model, info = _load_dense(directory, chosen, trust_remote_code)
    except PostilError:
        raise
    except LOADING_ERRORS as error:
        raise BaseModelError(f"transformers cannot load {directory}: {first_line(error)}") from error
    check_keys(info, directory)
    return _finish(model, tokenizer, name, directory, device, directory=directory)


def _load_dense(directory: Path, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, dict[str, Any]]:
    """(model, loading info) by transformers' own loader."""
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        str(directory),
        dtype=dtype,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        ignore_mismatched_sizes=True,  # they are reported in `info`, and refused later by name
        output_loading_info=True,
    )
    return model, info


def _configs_with_code(directory: Path, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The JSON files that may name code of the directory's own, by file name."""
    settings = directory / "tokenizer_config.json"
    return {"config.json": config} | ({settings.name: read_object(settings)} if settings.is_file() else {})


def _context_of(config: Any) -> int | None:
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _load_tokenizer(directory: Path, trust_remote_code: bool) -> Any:
    import transformers

    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise BaseModelError(f"{directory} has no tokenizer (tokenizer.json): download it again, whole.")
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=trust_remote_code
            )
    except LOADING_ERRORS as error:
        raise BaseModelError(f"transformers cannot load the tokenizer of {directory}: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise BaseModelError(f"{directory} has no fast tokenizer (tokenizer.json), which the masks need.")
    return tokenizer


def _finish(
    model: Any,
    tokenizer: Any,
    name: str,
    place: Path,
    device: torch.device,
    *,
    directory: Path | None = None,
    file: Path | None = None,
) -> Base:
    freeze(model)
    model.to(device)
    own_weights(model)
    check_finite(model, place)
    return Base(model, tokenizer, name, directory, file)


def _stored_dtype(tensors: list[StoredTensor], directory: Path) -> torch.dtype:
    """The dtype that nearly all stored floating values have, else the widest of them; the config may say another. The
    scales of 4-bit weights do not count.

    A few vectors in float32 (a router's biases, norms) do not widen everything else: transformers keeps those in
    float32 whose model needs them so.
    """
    values = Counter[str]()
    for tensor in plain_tensors(tensors):
        if tensor.dtype.startswith(("F", "BF")):
            values[tensor.dtype] += math.prod(tensor.shape)
    unknown = sorted(set(values) - set(_STORED))
    if unknown or not values:
        raise BaseModelError(
            f"{directory} stores {listed(unknown) if unknown else 'no'} floating tensors: postil opens "
            "float32, bfloat16 and float16."
        )
    kind, most = values.most_common(1)[0]
    if most >= NEARLY_ALL * values.total():
        return _STORED[kind]
    if set(values) == {"BF16", "F16"}:
        return torch.float32
    return max((_STORED[kind] for kind in values), key=lambda kind: kind.itemsize)
