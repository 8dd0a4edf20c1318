"""Data: rows to chat template to tokens with loss weights to packs."""

from postil.data.encode import encode_prompt
from postil.data.load import Dataset, load_data
from postil.data.options import DataOptions
from postil.data.packs import Pack, Sample, epoch_steps, pack, split_valid
from postil.data.report import DataReport
from postil.data.show import show_samples
from postil.data.template import parse_tool_calls, render, render_tool_calls, template_hash

__all__ = [
    "DataOptions",
    "DataReport",
    "Dataset",
    "Pack",
    "Sample",
    "encode_prompt",
    "epoch_steps",
    "load_data",
    "pack",
    "parse_tool_calls",
    "render",
    "render_tool_calls",
    "show_samples",
    "split_valid",
    "template_hash",
]
