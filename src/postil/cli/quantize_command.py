"""postil quantize: a base written once in 4 bits, as bitsandbytes and transformers read it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from postil import console
from postil.cli.words import Code


def quantize(
    base: Annotated[str, typer.Argument(help="Model directory, known base, hub name, GGUF.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the 4-bit model directory goes.")],
    dtype: Annotated[str, typer.Option(help="Of all else: auto (as stored), float32, bfloat16, float16.")] = "auto",
    trust_remote_code: Code = False,
) -> None:
    """Write a base in 4 bits (NF4, double quantised), which opens at once and loads in transformers as well.

    The linear layers of the decoder are quantised; embeddings, head and norms stay as stored.
    Example: postil quantize smollm2-135m-instruct --out smollm2-nf4
    """
    from postil.base.nf4_directory import quantise_directory

    size = quantise_directory(base, out, dtype=dtype, trust_remote_code=trust_remote_code)
    console.note(
        f"{size.layers} layers in {size.nf4 / 1e6:.1f} MB, {size.share:.3f} of the {size.bf16 / 1e6:.1f} MB that "
        "they take in bfloat16"
    )
    console.out.print(str(out), soft_wrap=True)
