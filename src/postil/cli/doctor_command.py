"""postil doctor: the machine, the versions, and which paths run here and why."""

from __future__ import annotations

import platform

from postil import console


def doctor() -> None:
    """Show the machine, the versions and which compute paths run.

    Example: postil doctor
    """
    from importlib.metadata import version

    import torch

    memory = "unknown"
    try:
        import os

        memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):
        pass
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts = {
        "postil": version("postil"),
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "transformers": version("transformers"),
        "processor": f"{platform.machine()}, torch uses {torch.backends.cpu.get_cpu_capability()}",
        "memory": memory,
        "GPU": cuda,
        "adapted_linear": "plain torch (no native kernel is built yet)",
        "attention": "torch's fused attention per sequence; one batched product when decoding",
        "loss": "chunked through the head, gradient in the forward pass",
    }
    for key, value in facts.items():
        console.out.print(f"{key:>14}  {value}", soft_wrap=True, markup=False)
