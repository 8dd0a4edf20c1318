"""postil doctor: the machine, the versions, and which paths run here (and for a base) and why."""

from __future__ import annotations

import os
import platform
from typing import Annotated

import typer

from postil import console
from postil.cli.words import Code


def doctor(
    base: Annotated[str | None, typer.Option("--base", "-b", help="Explain which paths this base takes.")] = None,
    trust_remote_code: Code = False,
) -> None:
    """Show the machine, the versions and which compute paths run.

    Example: postil doctor --base smollm2-135m-instruct
    """
    facts = machine_facts()
    if base is not None:
        facts |= base_facts(base, trust_remote_code)
    for key, value in facts.items():
        console.out.print(f"{key:>14}  {value}", soft_wrap=True, markup=False)


def machine_facts() -> dict[str, str]:
    """Versions, processor, memory, GPU, and the path of each op."""
    from importlib.metadata import version

    import torch

    from postil.kernels.dense import instructions, multiplies

    pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in os.sysconf_names else 0
    memory = f"{pages * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB" if pages else "unknown"
    return {
        "postil": version("postil"),
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "transformers": version("transformers"),
        "processor": f"{platform.machine()}, torch uses {instructions()}",
        "memory": memory,
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "adapted_linear": "plain torch, one autograd node per group (no native kernel is built yet)",
        "dense": "torch's own products"
        + ("" if multiplies(torch.bfloat16) else ", bfloat16 in float32 tiles: this CPU has no such instructions"),
        "attention": "torch's fused kernel per sequence, in float32 on the CPU; one batched product when decoding",
        "loss": "chunked through the head, gradient in the forward pass",
    }


def base_facts(source: str, trust_remote_code: bool = False) -> dict[str, str]:
    """Which way a base's architecture runs, found by running it."""
    from postil.adapter import attach, detach
    from postil.adapter.layers import length_dependent_rotaries
    from postil.base import load_base

    base = load_base(source, trust_remote_code=trust_remote_code)
    model = attach(base)
    packs = model.packs
    rotaries = len(length_dependent_rotaries(base.model))
    detach(model)
    way = (
        "packed: one flat row of tokens, logits equal to each sequence alone"
        if packs
        else "one sequence at a time through transformers' attention: its code does not take ours (slower, right)"
    )
    return {
        "base": f"{base.source}, {base.architecture}, {base.dtype} on {base.device}",
        "context": str(base.context or "not stated"),
        "runs": way,
        "rotary": "frequencies by each sequence's own length" if rotaries else "the same for every length",
        "fingerprint": str(base.fingerprint()),
    }
