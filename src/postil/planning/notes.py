"""What a plan says in words: the sums behind the field's known figures, with this base's numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from postil.planning.memory import Memory
from postil.planning.shapes import Shape

if TYPE_CHECKING:
    import torch

    from postil.planning.plan import Counted, PlanOptions


def notes_of(shape: Shape, counted: Counted, memory: Memory, options: PlanOptions, dtype: torch.dtype) -> list[str]:
    """Sentences beside the table."""
    notes = []
    if counted.largest is not None:
        path, d_out, d_in, beside = counted.largest
        values = d_out * d_in
        notes.append(
            f"the largest adapted matrix, {path} ({d_out}x{d_in}), has {beside:,} adapter parameters at "
            f"r={options.lora.rank_of(path)} beside its {values / 1e6:.1f} M ({beside / values:.2%})"
        )
    if options.method == "full":
        notes.append(_full(counted.parameters, dtype))
    if options.method == "qlora":
        notes.append(
            f"the base in NF4 takes {memory.weights / 1e9:.1f} GB: 4.127 bits a weight in the decoder's linear "
            "layers (QLoRA, section 3), embeddings and head as stored"
        )
    said = shape.field.get(options.method)
    if said:
        notes.append(f"for comparison: {said}")
    return notes


def _full(parameters: int, dtype: torch.dtype) -> str:
    """Bytes a parameter by what is kept; activations come on top."""
    size, name = dtype.itemsize, str(dtype).removeprefix("torch.")
    bare, masters, sums = 2 * size + 8, 2 * size + 8 + 4, size + 4 + 4 + 8 + size
    return (
        f"weights and gradients in {name} and two float32 moments are {bare} bytes a parameter, "
        f"{bare * parameters / 1e9:.1f} GB; with float32 masters {masters} bytes, "
        f"{masters * parameters / 1e9:.1f} GB; postil keeps masters and sums the gradients in float32 as well: "
        f"{sums} bytes, {sums * parameters / 1e9:.1f} GB, and one float32 buffer in passing at the update; "
        "activations come on top"
    )
