"""postil shrink: an adapter cut to a smaller rank, with what that changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from postil import console
from postil.cli.words import Code
from postil.errors import AdapterError

if TYPE_CHECKING:
    from postil.adapter.shrink import Shrunk
    from postil.judging.card.model import Comparison


def shrink(
    adapter: Annotated[Path, typer.Argument(help="An adapter directory.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the smaller adapter goes.")],
    rank: Annotated[int | None, typer.Option("--rank", "-r", help="The rank of every module.")] = None,
    keep: Annotated[str | None, typer.Option(help="Or the share of each ΔW's energy to keep, such as 99%.")] = None,
    base: Annotated[str | None, typer.Option("--base", "-b", help="Measure the change on this base as well.")] = None,
    target: Annotated[str | None, typer.Option("--target", "-t", help="Held-out rows of its task.")] = None,
    general: Annotated[str, typer.Option(help='Rows {"text"} of general text; none leaves it out.')] = "shipped",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    trust_remote_code: Code = False,
) -> None:
    """Cut an adapter's ranks by SVD: the nearest adapter of that rank, and how near it is.

    Example: postil shrink runs/support/adapter --rank 4 --out small --base smollm2-135m-instruct --target test.jsonl
    """
    from postil.adapter.peft_files import load_adapter, save_adapter
    from postil.adapter.shrink import shrink as run
    from postil.files import check_vacant

    if base is None and target is not None:
        raise AdapterError("the change on a target is measured on the base: give it with --base")
    check_vacant(out)
    before = load_adapter(adapter)
    found = run(before, rank=rank, keep=None if keep is None else share_of(keep))
    measured: dict[str, Comparison] = {}
    if base is not None:
        from postil.base import load_base
        from postil.judging.between import between

        quant = "nf4" if before.base.get("form") == "nf4" else None  # as it was trained
        opened = load_base(base, dtype=dtype, device=device, quant=quant, trust_remote_code=trust_remote_code)
        console.note(f"measuring both on the base{' in 4 bits' if opened.quantised else ''}")
        measured = between(
            opened, before, found.adapter, target=target, general=None if general == "none" else general
        )
        found.adapter.card["shrunk"]["measured"] = {
            name: one.model_dump(mode="json") for name, one in measured.items()
        }
    save_adapter(found.adapter, out)
    if rank is not None and rank > max(pair[0] for pair in found.ranks.values()):
        console.warn(f"--rank {rank} is above every rank of this adapter, and a rank never grows: nothing was cut")
    _print(found, before.parameters, measured)
    console.out.print(str(out), soft_wrap=True)


def share_of(text: str) -> float:
    """0.99 of "99%", "0.99" or "99 %". Raises AdapterError."""
    number = text.strip().removesuffix("%").strip()
    try:
        value = float(number)
    except ValueError:
        raise AdapterError(f"--keep {text}: give a share such as 99% or 0.99") from None
    return value / 100 if text.strip().endswith("%") else value


def _print(found: Shrunk, before: int, measured: dict[str, Comparison]) -> None:
    after = found.adapter.parameters
    was, now = (sorted({pair[n] for pair in found.ranks.values()}) for n in (0, 1))
    worst = max(found.errors, key=lambda path: found.errors[path])
    lines = [
        f"{len(found.ranks)} modules, rank {_span(was)} to {_span(now)}: {before:,} parameters to {after:,} "
        f"({after / before:.0%})",
        f"ΔW moved by {found.error:.2%} of its norm in all, by {found.errors[worst]:.2%} at most ({worst})",
    ]
    for name, one in measured.items():
        lines.append(
            f"{name}: {one.base.value:.4f} to {one.adapter.value:.4f} {one.unit} ({one.difference.value:+.4f}, "
            f"{one.difference.low:+.4f} to {one.difference.high:+.4f}, {one.rows:,} rows): {one.verdict}"
        )
    for line in lines:
        console.out.print(line, soft_wrap=True, markup=False)


def _span(ranks: list[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}..{ranks[-1]}"
