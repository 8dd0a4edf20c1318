"""NF4 weights to and from tensors under bitsandbytes' keys, as its serialised checkpoints hold them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from postil.base.stored import NF4_COMPANIONS, NF4_STATE
from postil.errors import BaseModelError, listed, nearest
from postil.kernels.nf4 import Nf4Weight
from postil.kernels.nf4.codes import CPU, nf4_codes
from postil.kernels.nf4.op import BLOCKSIZES, SOURCE_DTYPES

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SOURCE_DTYPES}
_PLAIN_FIELDS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")
_STATE = ".quant_state."  # what follows names the kind: bitsandbytes__nf4


def to_tensors(name: str, w: Nf4Weight, *, quant_storage: torch.dtype = torch.uint8) -> dict[str, torch.Tensor]:
    """`name` (such as model.layers.0.mlp.up_proj.weight) and its state's keys, each with its tensor.

    The codes and scales are those of `w`, not copies; the two maps are copies, so that no tensors of a file
    share memory. quant_storage: the dtype that the bytes of the codes are seen as (bitsandbytes' option for
    FSDP). Raises BaseModelError where that dtype does not divide the bytes.
    """
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": w.blocksize,
        "dtype": str(w.dtype).removeprefix("torch."),
        "shape": list(w.shape),
    }
    tensors = {name: _stored_as(name, w.packed, quant_storage), f"{name}.absmax": w.absmax}
    tensors[f"{name}.quant_map"] = nf4_codes(w.packed.device).clone()
    if w.nested_absmax is not None and w.nested_quant_map is not None and w.offset is not None:
        state |= {
            "nested_blocksize": w.nested_blocksize,
            "nested_dtype": str(w.nested_absmax.dtype).removeprefix("torch."),
            "nested_offset": w.offset.item(),
        }
        tensors[f"{name}.nested_absmax"] = w.nested_absmax
        tensors[f"{name}.nested_quant_map"] = w.nested_quant_map.clone()
    text = json.dumps(state).encode()
    tensors[f"{name}{NF4_STATE}"] = torch.tensor(list(text), dtype=torch.uint8, device=w.packed.device)
    return tensors


def from_tensors(name: str, tensors: Mapping[str, torch.Tensor]) -> Nf4Weight:
    """The weight `name` out of a checkpoint's tensors; those of other weights may lie beside it.

    The weight holds the tensors themselves, bit for bit; codes stored under another dtype are seen as bytes.
    Raises BaseModelError that names the key at fault: one that is missing, unknown, of another shape, dtype or
    kind (fp4, int8), or a state that does not fit the tensors.
    """
    _check_keys(name, tensors)
    state = _state(f"{name}{NF4_STATE}", tensors[f"{name}{NF4_STATE}"])
    if f"{name}.nested_absmax" in tensors and "nested_offset" not in state:
        raise BaseModelError(f"{name}.nested_absmax is there, but the weight's state says nothing of nested scales.")
    d_out, d_in = state["shape"]
    size = d_out * d_in
    blocks = -(-size // state["blocksize"])
    quant_map = _tensor(f"{name}.quant_map", tensors, torch.float32, (16,))
    if not torch.equal(quant_map.cpu(), nf4_codes(CPU)):
        raise BaseModelError(
            f"{name}.quant_map holds other values than NF4's sixteen, which are the only ones known."
        )
    packed = _bytes(name, tensors[name], -(-size // 2))
    if "nested_offset" not in state:
        absmax = _tensor(f"{name}.absmax", tensors, torch.float32, (blocks,))
        return Nf4Weight(packed, absmax, (d_out, d_in), _DTYPES[state["dtype"]], blocksize=state["blocksize"])
    nested = -(-blocks // state["nested_blocksize"])
    return Nf4Weight(
        packed,
        _tensor(f"{name}.absmax", tensors, torch.uint8, (blocks,)),
        (d_out, d_in),
        _DTYPES[state["dtype"]],
        _tensor(f"{name}.nested_absmax", tensors, torch.float32, (nested,)),
        torch.tensor(state["nested_offset"], dtype=torch.float32, device=packed.device),
        _tensor(f"{name}.nested_quant_map", tensors, torch.float32, (256,)),
        state["blocksize"],
        state["nested_blocksize"],
    )


def _check_keys(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise unless the keys are those of one NF4 weight, nested or not."""
    if name not in tensors:
        raise BaseModelError(f"{name} is missing from the checkpoint{nearest(name, tensors)}.")
    own = sorted(key for key in tensors if key.startswith(f"{name}."))
    kinds = [key.removeprefix(f"{name}{_STATE}") for key in own if key.startswith(f"{name}{_STATE}")]
    other = [kind.removeprefix("bitsandbytes__") for kind in kinds if f"{_STATE}{kind}" != NF4_STATE]
    if other:
        raise BaseModelError(f"{name} is stored in {other[0]}, of bitsandbytes' 4-bit kinds postil reads nf4 only.")
    if not kinds:
        path = name.removesuffix(".weight")
        if tensors[name].dtype == torch.int8 or any(f"{path}.{end}" in tensors for end in ("SCB", "weight_format")):
            raise BaseModelError(f"{name} is stored in bitsandbytes' int8, which postil does not read: nf4 only.")
        raise BaseModelError(f"{name}{NF4_STATE} is missing: without it {name} is no 4-bit weight.")
    known = [f"{name}{end}" for end in NF4_COMPANIONS]
    unknown = next((key for key in own if key not in known), None)
    if unknown is not None:
        raise BaseModelError(f"{unknown} is no part of a weight stored in nf4{nearest(unknown, known)}.")
    nested = any(key in tensors for key in known if ".nested_" in key)
    missing = [key for key in known if key not in tensors and (nested or ".nested_" not in key)]
    if missing:
        raise BaseModelError(f"{listed(missing)} of a weight stored in nf4 is missing from the checkpoint.")


def _state(key: str, tensor: torch.Tensor) -> dict[str, Any]:
    """The JSON of a quant state, every field checked."""
    try:
        state = json.loads(bytes(tensor.flatten().tolist()).decode())
    except (TypeError, ValueError, RecursionError) as error:  # no bytes, no JSON, no sane JSON
        raise BaseModelError(f"{key} holds no JSON: the checkpoint is damaged.") from error
    if not isinstance(state, dict):
        raise BaseModelError(f"{key} holds no JSON object: the checkpoint is damaged.")
    nested = any(field in state for field in _NESTED_FIELDS)
    fields = _PLAIN_FIELDS + _NESTED_FIELDS if nested else _PLAIN_FIELDS
    missing = [field for field in fields if field not in state]
    unknown = [field for field in state if field not in fields]
    if missing or unknown:
        wrong = f"lacks {listed(missing)}" if missing else f"has {listed(unknown)}, which is not known"
        raise BaseModelError(f"{key} {wrong}: postil reads the states that bitsandbytes writes.")
    known: dict[str, bool] = {
        "quant_type": state["quant_type"] == "nf4",
        "blocksize": _is_count(state["blocksize"]) and state["blocksize"] in BLOCKSIZES,
        "dtype": isinstance(state["dtype"], str) and state["dtype"] in _DTYPES,
        "shape": _is_shape(state["shape"]),
    }
    if nested:
        known |= {
            "nested_blocksize": _is_count(state["nested_blocksize"]),
            "nested_dtype": state["nested_dtype"] == "float32",
            "nested_offset": type(state["nested_offset"]) is float and math.isfinite(state["nested_offset"]),
        }
    wrong_field = next((field for field, right in known.items() if not right), None)
    if wrong_field is not None:
        raise BaseModelError(
            f"{key} has {wrong_field} {state[wrong_field]!r}, which postil does not read: NF4 of a matrix of "
            f"{listed(_DTYPES)}, in blocks of {listed(BLOCKSIZES)}, scales nested in float32."
        )
    return state


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_count(side) for side in value)


def _tensor(
    key: str, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """One of the state's tensors, its dtype and shape (and that it is finite) checked."""
    if key not in tensors:
        raise BaseModelError(f"{key} of a weight stored in nf4 is missing from the checkpoint.")
    tensor = tensors[key]
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise BaseModelError(
            f"{key} is {tensor.dtype} {list(tensor.shape)}, where the weight's state wants {dtype} {list(shape)}."
        )
    if dtype.is_floating_point and not tensor.isfinite().all():
        raise BaseModelError(f"{key} holds values that are not finite: the checkpoint is damaged.")
    return tensor


def _bytes(name: str, stored: torch.Tensor, size: int) -> torch.Tensor:
    """The codes as bytes [size, 1], whatever dtype they are stored as (bitsandbytes' quant_storage)."""
    wanted = f"{size} bytes of codes as the state of the weight has it"
    if stored.ndim != 2 or stored.shape[1] != 1:
        raise BaseModelError(f"{name} has shape {list(stored.shape)}, where [n, 1] is due: {wanted}.")
    packed = stored.contiguous().view(-1).view(torch.uint8)
    if packed.numel() != size:
        raise BaseModelError(f"{name} holds {packed.numel()} bytes, not {wanted}.")
    return packed[:, None]


def _stored_as(name: str, packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if packed.numel() % dtype.itemsize:
        raise BaseModelError(
            f"{name} has {packed.numel()} bytes of codes, which cannot be stored as {dtype}: use uint8."
        )
    return packed if dtype == torch.uint8 else packed.view(-1).view(dtype)[:, None]
