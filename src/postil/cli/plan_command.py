"""postil plan: what a training run takes in memory and on disk, and which cards it fits on, before it is run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from postil import console
from postil.cli.tables import print_table

if TYPE_CHECKING:
    from postil.planning.plan import Plan

LABELS = {
    "weights": "weights",
    "masters": "trained values, float32",
    "gradients": "gradients",
    "optimiser": "optimiser state, float32",
    "kept": "best state so far, float32",
    "origin": "the base, to compare with",
    "activations": "activations",
    "loss": "logits and loss, in chunks",
    "working": "working space",
    "slack": "process and heap beyond what is in use",
}


def plan(
    base: Annotated[
        str,
        typer.Option("--base", "-b", help="Model directory, config.json, known base, or 7B, 13B, 70B, 8B."),
    ],
    method: Annotated[str, typer.Option(help="lora, qlora or full.")] = "lora",
    r: Annotated[int, typer.Option("--r", help="The adapter's rank.")] = 8,
    targets: Annotated[
        str | None, typer.Option(help="attention (default), feed-forward, all-linear, or names with commas.")
    ] = None,
    pack_tokens: Annotated[
        int, typer.Option("--pack-tokens", "--batch-tokens", help="Tokens of the largest flat batch.")
    ] = 4096,
    sequence_tokens: Annotated[int, typer.Option(help="Tokens of one sequence in it.")] = 512,
    target_share: Annotated[float, typer.Option(help="The share of its tokens with loss.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="Of the base: auto (as stored), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="cuda, or cpu for this machine.")] = "cuda",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations in the backward pass.")
    ] = False,
    guard: Annotated[
        bool, typer.Option("--guard", help="General text is watched or held to (--guard or kl_weight in training).")
    ] = False,
    copies: Annotated[int, typer.Option(help="Customised models to store.")] = 50,
    json_: Annotated[bool, typer.Option("--json", help="The plan as JSON.")] = False,
) -> None:
    """Say what a training run would take, from the base's configuration alone: no weight is read.

    The step itself is traced on tensors without data; nothing is computed.
    Example: postil plan --base 7B --method qlora --gradient-checkpointing
    """
    from postil.planning.plan import PlanOptions
    from postil.planning.plan import plan as run

    names = tuple(name.strip() for name in (targets or "").split(",") if name.strip())
    lora: dict[str, Any] = {"r": r, "target_modules": names[0] if len(names) == 1 else names or None}
    options = PlanOptions.parse(
        {"method": method, "lora": lora, "pack_tokens": pack_tokens, "sequence_tokens": sequence_tokens,
         "target_share": target_share, "dtype": dtype, "device": device,
         "gradient_checkpointing": gradient_checkpointing, "guard": guard, "copies": copies}
    )  # fmt: skip
    result = run(base, options)
    if json_:
        typer.echo(result.model_dump_json(indent=2))
        return
    _print(result)


def _print(result: Plan) -> None:
    counted, memory, options = result.counted, result.memory, result.options
    trained = f"{counted.trained:,} trained ({counted.trained / counted.parameters:.3%})"
    console.out.print(
        f"{result.base}: {result.architecture}, {counted.parameters:,} parameters in {result.dtype}; "
        f"{options.method}, {trained if options.method != 'full' else 'all of them trained'}; "
        f"{len(options.sequences)} sequences of up to {max(options.sequences)} tokens in a batch",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    rows = [["at the peak of a step", "size", "bytes a parameter"]]
    rows += [
        [LABELS[part], _size(size), f"{size / counted.parameters:.2f}"] for part, size in memory.parts.items() if size
    ]
    rows.append(["in all", _size(memory.total), f"{memory.total / counted.parameters:.2f}"])
    print_table(rows, right=(1, 2), bold=(0, len(rows) - 1))
    if result.checkpointed is not None:
        console.out.print(f"with --gradient-checkpointing: {_size(result.checkpointed.total)} in all", soft_wrap=True)
    console.out.print(
        f"the peak is in the {memory.moment}; logits are made 256 rows at a time, never all "
        f"{_size(result.undivided_logits)} of them",
        soft_wrap=True,
    )
    _print_storage(result)
    cards = [[card.name, f"{card.gib:g}", "yes" if card.fits else "no", card.why] for card in result.cards]
    print_table([["card", "GiB", "fits", ""], *cards], right=(1,))
    for note in result.notes:
        console.out.print(note, soft_wrap=True, markup=False)


def _print_storage(result: Plan) -> None:
    storage = result.storage
    lines = [f"on disk: the base {_size(storage.base)}, a checkpoint {_size(storage.checkpoint)}"]
    if storage.adapter is not None and storage.shared is not None:
        lines[0] += f", the adapter {_size(storage.adapter)}"
        lines.append(
            f"{storage.copies} customised models: {_size(storage.shared)} as one base and {storage.copies} adapters, "
            f"{_size(storage.whole)} as {storage.copies} whole models"
        )
    else:
        lines.append(f"{storage.copies} customised models: {_size(storage.whole)}, each a whole model")
    for line in lines:
        console.out.print(line, soft_wrap=True, markup=False)


def _size(size: int) -> str:
    """Decimal gigabytes, as the field counts them, or megabytes."""
    if size >= 1e8:
        return f"{size / 1e9:,.1f} GB" if size >= 1e10 else f"{size / 1e9:,.2f} GB"
    return f"{size / 1e6:,.1f} MB"
