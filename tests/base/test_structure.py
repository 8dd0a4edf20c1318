"""The decoder's layers, found among other lists of the same length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from postil.base import decoder_layers
from postil.base.quantise import quantise_model
from postil.errors import BaseModelError


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    )


class Before(nn.Module):
    """A list that comes before the layers."""

    def __init__(self, first: nn.ModuleList, model: nn.Module) -> None:
        super().__init__()
        self.first, self.config = first, model.config
        self.model = model


OTHERS = {
    "projections": lambda: nn.ModuleList(nn.Linear(300, 300) for _ in range(2)),
    "norms": lambda: nn.ModuleList(nn.LayerNorm(8) for _ in range(2)),
    "layers of an encoder that attends otherwise": lambda: nn.ModuleList(
        nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2)
    ),
    "deep adapters": lambda: nn.ModuleList(nn.Sequential(*(nn.Linear(2, 2) for _ in range(40))) for _ in range(2)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_list_of_the_same_length_is_not_taken(other: str) -> None:
    model = llama()
    whole: Any = Before(OTHERS[other](), model)
    path, layers = decoder_layers(whole)
    assert (path, layers) == ("model.model.layers", model.model.layers)
    whole.first = nn.ModuleList([*whole.first, nn.Identity()])  # of another length
    assert decoder_layers(whole)[1] is model.model.layers


def test_what_is_quantised_is_in_the_layers() -> None:
    model = llama()
    model.model._modules = {"per_layer": nn.ModuleList(nn.Linear(32, 32) for _ in range(2)), **model.model._modules}
    quantise_model(model)
    assert all(isinstance(linear, nn.Linear) for linear in model.model.per_layer)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Nf4Linear"


def test_layers_without_an_index_are_found_by_their_size() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16))
    for module in model.modules():
        module.__dict__.pop("layer_idx", None)
    whole: Any = Before(nn.ModuleList(nn.Linear(300, 300) for _ in range(2)), model)
    assert decoder_layers(whole)[1] is model.transformer.h


def test_no_list_is_an_error() -> None:
    model = llama()
    model.config.num_hidden_layers = 7
    with pytest.raises(BaseModelError, match="no list of 7 decoder layers"):
        decoder_layers(model)
