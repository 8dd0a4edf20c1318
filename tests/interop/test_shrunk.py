"""A shrunk adapter, its ranks uneven, means the same to PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from postil.adapter import LoraConfig, attach, detach
from postil.adapter.peft_files import save_adapter
from postil.adapter.shrink import shrink


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_reads_a_shrunk_adapter(name: str, lab: Any, tmp_path: Path) -> None:
    base = lab.tiny(name)
    model = attach(base, LoraConfig(r=6, alpha=4, use_rslora=True, target_modules="all-linear"))
    lab.scramble(model)
    found = shrink(model.export("default"), keep=0.8)
    assert len(set(found.adapter.ranks.values())) > 1
    attach(model, found.adapter, name="small")
    model.activate("small")
    ours, moved = lab.plain(model.model), model.residents["default"]
    assert moved.parameters > model.residents["small"].parameters
    save_adapter(found.adapter, tmp_path / "small")
    detach(model)
    theirs = lab.plain(lab.peft_load(lab.tiny(name), tmp_path / "small"))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert (ours - lab.plain(base)).abs().max() > 1e-2
