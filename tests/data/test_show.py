"""The coloured view: runs of learned and masked text, with counts."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from rich.console import Console

from postil.data import DataOptions, Sample, load_data, show_samples
from postil.data.show import LEARNED, MASKED, WEIGHTED, runs

ROW = {
    "messages": [
        {"role": "user", "content": "[red]Ask[/red]"},
        {"role": "assistant", "content": "Yes ü漢.", "weight": 0.5},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No."},
    ]
}


def printed(sample: Sample, tokenizer: Any, **options: Any) -> tuple[str, str]:
    """The view as plain text and with colour codes."""
    texts = []
    for colour in (False, True):
        console = Console(
            file=io.StringIO(), width=120, force_terminal=colour, no_color=not colour, color_system="standard"
        )
        for part in show_samples([sample], tokenizer, **options):
            console.print(part)
        assert isinstance(console.file, io.StringIO)
        texts.append(console.file.getvalue())
    return texts[0], texts[1]


def test_text_marks_and_counts(chatml: Any) -> None:
    (sample,) = load_data([ROW], chatml, DataOptions(learn="weight")).samples
    plain, coloured = printed(sample, chatml, marks=True)
    learned = sample.target_tokens
    assert f"row 1: {len(sample.ids)} tokens, {learned} learned, {len(sample.ids) - learned} masked" in plain
    assert "⟦Yes ü漢.<|im_end|>⟧" in plain
    assert "⟦No.<|im_end|>⟧" in plain
    assert "[red]Ask[/red]<|im_end|>" in plain
    assert "\x1b[1;33m⟦Yes" in coloured
    assert "\x1b[1;32m⟦No." in coloured
    assert {LEARNED, WEIGHTED, MASKED} == {"bold green", "bold yellow", "dim"}
    assert "⟦" not in printed(sample, chatml)[0]


def test_runs_join_to_the_whole_text(chatml: Any, llama2: Any) -> None:
    for tokenizer in (chatml, llama2):
        (sample,) = load_data([{"messages": ROW["messages"]}], tokenizer).samples
        parts = runs(sample, tokenizer)
        assert "".join(text for text, _ in parts) == tokenizer.decode(sample.ids)
        assert [weight for _, weight in parts] == [0, 1] * (len(parts) // 2) + [0] * (len(parts) % 2)


def test_a_cut_sample_says_so(chatml: Any) -> None:
    sample = Sample(np.array([5, 6], np.int32), np.array([0, 1], np.float32), 3, truncated=True)
    assert "row 3: 2 tokens, 1 learned, 1 masked, cut" in printed(sample, chatml)[0]
