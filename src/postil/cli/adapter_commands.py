"""postil inspect, merge, adapters diff: what is in an adapter, and an adapter made part of its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from postil import console
from postil.cli.words import Code

adapters = typer.Typer(help="Compare adapters.", no_args_is_help=True)
Directory = Annotated[Path, typer.Argument(help="An adapter directory.")]


@adapters.callback()
def _group() -> None:
    """Compare adapters."""


def inspect(adapter: Directory) -> None:
    """Show what is in an adapter directory: base, ranks, modules, sizes, norms.

    Example: postil inspect runs/support/adapter
    """
    from collections import Counter

    from postil.adapter.peft_files import load_adapter

    loaded = load_adapter(adapter)
    config = loaded.config
    kinds = Counter(path.rsplit(".", 1)[-1] for path in loaded.modules)
    norms = [float(t.norm()) for key, t in loaded.tensors.items() if ".lora_B" in key]
    facts = {
        "base": f"{loaded.base_name or 'unknown'}  {loaded.base.get('source', '(no fingerprint: made elsewhere)')}",
        "rank, alpha": f"{config.r}, {config.alpha:g}{' (rsLoRA)' if config.use_rslora else ''}",
        "ranks found": ", ".join(str(rank) for rank in sorted(set(loaded.ranks.values()))),
        "modules": ", ".join(f"{name} ×{count}" for name, count in kinds.items()),
        "parameters": f"{loaded.parameters:,}",
        "size": f"{sum(t.numel() * t.element_size() for t in loaded.tensors.values()) / 1e6:.2f} MB",
        "norm of B": f"{min(norms):.3g} … {max(norms):.3g}" if norms else "no B",
        "saved whole": ", ".join(config.modules_to_save or ()) or "none",
        "card": ", ".join(sorted(loaded.card)) or "none",
    }
    for key, value in facts.items():
        console.out.print(f"{key:>12}  {value}", soft_wrap=True, markup=False)


@adapters.command()
def diff(first: Directory, second: Annotated[Path, typer.Argument(help="Another adapter directory.")]) -> None:
    """Say how two adapters differ: configuration, tensors, and the distance of their values.

    Example: postil adapters diff runs/a/adapter runs/b/adapter
    """
    from postil.adapter.peft_files import load_adapter

    a, b = load_adapter(first), load_adapter(second)
    mine, other = a.config.model_dump(), b.config.model_dump()
    lines = [f"{key}: {mine[key]} | {other[key]}" for key in mine if mine[key] != other[key]]
    if a.base != b.base:
        lines.append(f"base: {a.base or 'unknown'} | {b.base or 'unknown'}")
    lines += [f"only in the first: {key}" for key in a.tensors if key not in b.tensors]
    lines += [f"only in the second: {key}" for key in b.tensors if key not in a.tensors]
    changed = 0
    squared = size = 0.0
    for key in sorted(a.tensors.keys() & b.tensors.keys()):
        x, y = a.tensors[key].float(), b.tensors[key].float()
        if x.shape != y.shape:
            lines.append(f"{key}: shape {list(x.shape)} | {list(y.shape)}")
        elif not x.equal(y):
            changed += 1
            squared += float((x - y).square().sum())
            size += float(x.square().sum())
    if changed:
        lines.append(
            f"{changed} tensors differ in value, by {(squared / max(size, 1e-30)) ** 0.5:.3g} of the first's norm"
        )
    for line in lines or ["no difference"]:
        console.out.print(line, soft_wrap=True, markup=False)


def merge(
    adapter: Directory,
    base: Annotated[str, typer.Option("--base", "-b", help="The base that the adapter belongs to.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the merged model directory goes.")],
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Take an adapter made for another base.")] = False,
    into: Annotated[
        str | None,
        typer.Option(help="On a 4-bit base: original (the weights before) or dequantised (a dense copy)."),
    ] = None,
    bound: Annotated[
        float | None, typer.Option(min=0, help="The most that rounding may move a logit (default: by the dtype).")
    ] = None,
    trust_remote_code: Code = False,
) -> None:
    """Write base and adapter as one plain model directory that transformers loads without postil.

    An adapter trained on a 4-bit base needs --into; the way from the 4-bit base to what is written is measured.
    Example: postil merge runs/support/adapter --base smollm2-135m-instruct --out merged
    """
    from postil.adapter.export import export_merged
    from postil.adapter.peft_files import load_adapter
    from postil.base import load_base
    from postil.files import check_vacant

    check_vacant(out)
    loaded = load_adapter(adapter)
    quant = "nf4" if loaded.base.get("form") == "nf4" else None
    if force:
        loaded.base = {}  # whose it was is forgotten, so there is nothing to compare with
    opened = load_base(base, dtype=dtype, quant=quant, trust_remote_code=trust_remote_code)
    written = export_merged(opened, loaded, out, bound=bound, into=into)
    console.note(f"{written.drift} against base and adapter apart")
    if written.from_nf4 is not None:
        console.note(f"{written.from_nf4} against the adapter on the 4-bit base")
    console.out.print(str(written.path), soft_wrap=True)
