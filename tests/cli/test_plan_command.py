"""postil plan: the table, JSON, and what a slip prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def test_the_table(postil: Any) -> None:
    done = postil("plan", "--base", "7B", "--gradient-checkpointing")
    assert done.code == 0, done
    text = " ".join(done.out.split())
    for said in ("6,738,415,616 parameters in bfloat16", "8,388,608 trained (0.124%)", "weights 13.5 GB 2.00",
                 "RTX 4090 24 yes", "65,536 adapter parameters at r=8 beside its 16.8 M",
                 "50 customised models: 15.2 GB as one base and 50 adapters, 673.8 GB as 50 whole models",
                 "the adapter 33.6 MB"):  # fmt: skip
        assert said in text, said
    assert "with --gradient-checkpointing:" not in text


def test_70b_in_four_bits_and_full(postil: Any) -> None:
    text = " ".join(postil("plan", "--base", "70B", "--method", "qlora").out.split())
    assert "RTX 4090 24 no the weights alone take 33.9 GiB: only by streaming" in text
    assert "with --gradient-checkpointing:" in text
    full = " ".join(postil("plan", "--base", "7B", "--method", "full", "--pack-tokens", "64").out.split())
    assert "all of them trained" in full
    assert "12 bytes a parameter, 80.9 GB; with float32 masters 16 bytes, 107.8 GB" in full
    assert "each a whole model" in full


def test_a_directory_on_this_machine_as_json(postil: Any, base: Path) -> None:
    done = postil("plan", "--base", base, "--device", "cpu", "--batch-tokens", "100", "--sequence-tokens", "30",
                  "--targets", "q_proj,v_proj", "--r", "2", "--json")  # fmt: skip
    assert done.code == 0, done
    found = json.loads(done.out)
    assert found["dtype"] == "float32"
    assert found["counted"]["trained"] == 2 * 2 * ((32 + 32) + (32 + 16))
    assert found["options"]["pack_tokens"] == 100
    assert found["memory"]["slack"] > 0
    assert [card["name"] for card in found["cards"]] == ["this machine"]


def test_slips(refusal: Any, tmp_path: Path) -> None:
    assert "did you mean '7b'" in refusal("plan", "--base", "7bb")
    assert "should be 'lora', 'qlora' or 'full' (found 'qlor')" in refusal("plan", "--base", "7B", "--method", "qlor")
    assert "did you mean 'q_proj'" in refusal("plan", "--base", "7B", "--targets", "qproj")
    assert "target_share" in refusal("plan", "--base", "7B", "--target-share", "0")
    assert "is empty" in refusal("plan", "--base", tmp_path)
