"""The one wrapper around each decoder layer, and our attention and rotary in transformers' own models."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from postil.errors import AdapterError, BaseModelError, InternalError
from postil.kernels.attention import attention

if TYPE_CHECKING:
    from postil.adapter.model import AdaptedModel

IMPLEMENTATION = "postil"
OWNER = "_postil_owner"


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,  # [1, heads, tokens, dim]
    key: torch.Tensor,  # [1, kv_heads, tokens, dim]
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention call over the flat batch of the Layout in force; returns [1, tokens, heads, dim]."""
    owner: AdaptedModel | None = module.__dict__.get(OWNER)
    if owner is None or owner.layout is None:
        raise InternalError("postil's attention was called outside a Layout")
    if attention_mask is not None:  # transformers makes none for our attention: the model has its own (Doge)
        raise BaseModelError(f"{type(module).__name__} masks keys in a way of its own, which a pack does not have")
    owner.attention_calls[module.layer_idx] += 1
    layout = owner.layout
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    if layout.store is not None:
        k, v = layout.store.extend(int(module.layer_idx), k, v)  # type: ignore[arg-type]
    out = attention(
        q,
        k,
        v,
        layout.segments,
        scale=scaling if scaling is not None else q.shape[-1] ** -0.5,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out[None], None


AttentionInterface.register(IMPLEMENTATION, attention_forward)


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that choose an attention function by their configuration."""
    return [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "config")]


@contextmanager
def our_attention(modules: list[nn.Module]) -> Iterator[None]:
    """Switch these modules' configurations to our attention, and back."""
    configs: dict[int, Any] = {id(module.config): module.config for module in modules}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def owned(
    run: Callable[..., Any], owner: AdaptedModel, original: Callable[..., Any], *rest: Any
) -> Callable[..., Any]:
    """`run(owner, original, *rest, …)` in the place of a module's forward, with its signature.

    No closure: whoever copies or pickles the module comes upon its owner, which refuses; the layers of a copy would
    compute with those of the original.
    """
    return functools.update_wrapper(functools.partial(run, owner, original, *rest), original)


def layer_forward(owner: AdaptedModel, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A decoder layer's forward with recomputation in the backward pass where the model asks for it.

    The recomputation runs with the Layout of the forward pass, whatever is in force by then, and raises AdapterError
    where values of its adapters were written to since.
    """
    if not (owner.checkpointing and torch.is_grad_enabled() and owner.layout is not None):
        return original(*args, **kwargs)
    layout, spans = owner.layout, owner.spans_now
    versions = owner.versions(layout.spans)

    def run(*inner: Any, **named: Any) -> Any:
        with owner.under(layout, spans):
            if owner.versions(layout.spans) != versions:
                raise AdapterError(
                    "an adapter was written to after the forward pass, which cannot be recomputed; go backward first"
                )
            return original(*inner, **named)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def rotary_forward(
    owner: AdaptedModel,
    original: Callable[..., Any],
    module: nn.Module,
    x: torch.Tensor,
    position_ids: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A rotary embedding whose frequencies depend on the length: each sequence of a pack by its own length."""
    if owner.layout is None:
        return original(x, position_ids, *args, **kwargs)
    parts = []
    for segment in owner.layout.segments:
        if hasattr(module, "max_seq_len_cached"):
            setattr(module, "max_seq_len_cached", 0)  # noqa: B010 - no frequencies left over from another sequence
        rows = slice(segment.q0, segment.q1)
        parts.append(original(x[:, rows], position_ids[:, rows], *args, **kwargs))
    cos, sin = (torch.cat([part[i] for part in parts], 1) for i in (0, 1))
    return cos, sin


def plain_forward(owner: AdaptedModel, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A plain call in its turn; it leaves no activation behind, even where it fails or uses part of a group."""
    with owner.turn:
        try:
            return original(*args, **kwargs)
        finally:
            owner.forget()


def length_dependent_rotaries(model: nn.Module) -> list[nn.Module]:
    """Rotary modules of the dynamic and long-context kinds."""
    found = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(isinstance(kind, str) and ("dynamic" in kind or kind == "longrope") for kind in kinds):
            found.append(module)
    return found
