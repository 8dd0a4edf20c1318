"""What a run is: the digest that a checkpoint shares with what resumes from it, and the machine that it ran on."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from postil.adapter.bank import Resident
from postil.adapter.model import AdaptedModel
from postil.data import Sample
from postil.kernels.dense import instructions
from postil.training.general import General
from postil.training.optimizer import Trainable
from postil.training.options import TrainOptions


def identity_of(
    model: AdaptedModel,
    samples: Sequence[Sample],
    valid: Sequence[Sample],
    resident: Resident | None,
    weights: Trainable,
    options: TrainOptions,
    general: General | None = None,
) -> str:
    """What a checkpoint must share with the run that resumes from it: options, data, base, adapter, first values."""
    form = f"{model.base.fingerprint()} {model.base.dtype}" if model.base.quantised else str(model.base.fingerprint())
    digest = hashlib.sha256(form.encode())
    fields: list[Any] = [
        options.model_dump(mode="json", exclude={"keep_checkpoints", "checkpoint_every"}),
        general.sha256 if general is not None else None,
    ]
    if resident is not None:
        fields.append(resident.config.model_dump(mode="json"))
    digest.update(json.dumps(fields, sort_keys=True).encode())
    for kind in (samples, valid, *(general.given if general is not None else ())):
        digest.update(len(kind).to_bytes(8, "big"))
        for sample in kind:
            digest.update(len(sample.ids).to_bytes(8, "big"))
            digest.update(sample.ids.tobytes() + sample.weights.tobytes())
    digest.update(weights.flat.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def machine(device: torch.device) -> dict[str, Any]:
    """What decides the bytes beside recipe and data: another machine or version continues, with other bytes."""
    gpu = device.type == "cuda"
    return {
        "device": device.type,
        "GPU": torch.cuda.get_device_name(device) if gpu else None,
        "CUDA": torch.version.cuda if gpu else None,
        "threads": torch.get_num_threads(),
        "instructions": instructions(),
        "processor": platform.machine(),
        "torch": torch.__version__,
        "postil": version("postil"),
    }
