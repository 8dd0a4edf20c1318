"""One training step on tensors without data: the very code of training/, watched by a ledger of bytes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from postil.adapter import AdaptedModel, LoraConfig
from postil.base import Base, Nf4Linear, freeze
from postil.base.quantise import emptied, put, quantisable
from postil.base.quiet import quiet
from postil.base.structure import decoder_layers
from postil.errors import BaseModelError
from postil.kernels.dense import memory_apart
from postil.kernels.layout import Layout
from postil.kernels.loss import cross_entropy
from postil.kernels.nf4 import Nf4Weight
from postil.kernels.nf4.codes import nf4_pairs
from postil.kernels.nf4.op import TILE_VALUES
from postil.planning.ledger import Bytes, Ledger, Recorder
from postil.training.batch import spans_of
from postil.training.defaults import settled
from postil.training.optimizer import AdamW, AdapterWeights, FullWeights, Trainable
from postil.training.options import TrainOptions

BLOCK, NESTED_BLOCK = 64, 256
TRIED = (3, 2)  # lengths of a first, tiny pack: does the architecture take packs at all


def meta_model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a configuration on the meta device: every module and shape, no memory. Raises BaseModelError."""
    with torch.device("meta"):
        return _model(config, dtype)


def _model(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with quiet():
            model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise BaseModelError(f"transformers makes no {config.model_type} model of this config: {error}") from error
    freeze(model)
    made: PreTrainedModel = model
    return made


def traced_step(
    config: Any,
    dtype: torch.dtype,
    *,
    method: str,
    lora: LoraConfig,
    lengths: Sequence[int],
    targets: int,
    device: str,
    checkpointing: bool,
    kept: bool,
    general: bool,
) -> dict[str, Bytes]:
    """Part of the step (forward, loss, backward, update) → live bytes by part when it took most.

    Nothing is computed and no memory taken. lengths: tokens per sequence of the one pack; targets: tokens with
    loss; device: "cpu" or "cuda"; kept: a copy of the best state is held; general: text is compared with the base.
    Parts: weights, masters, gradients, optimiser, kept, origin, forward (activations), loss, backward, update, slack.
    """
    ledger = Ledger(heap=device == "cpu")
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        model = stack.enter_context(_traced_model(config, dtype, ledger, device, method == "qlora"))
        weights, spans = _trainable(model, ledger, method, lora, sum(lengths))
        with ledger.during("optimiser"):
            optimizer = AdamW.of(weights, settled(TrainOptions(), [])[0], total_steps=1)
        with ledger.during("kept"):
            best = weights.flat.detach().clone() if kept else None
        with ledger.during("origin"):
            origin = weights.origin() if general else None
        model.packs = _takes_packs(model)
        model.checkpointing = checkpointing
        ledger.forget_peaks()
        place = model.base.device
        with ledger.during("forward"), model.using(Layout.packed(lengths, spans)):
            ids = torch.zeros(sum(lengths), dtype=torch.int64, device=place)
            hidden = model.hidden(ids, ids.clone())
            with ledger.during("loss"):
                rows = ids[:targets]
                share = torch.zeros(targets, device=place)
                inner = spans.within(0, targets)

                def head(chunk: torch.Tensor, start: int, end: int) -> torch.Tensor:
                    return model.logits(chunk, inner.within(start, end))

                total, _ = cross_entropy(hidden.index_select(0, rows), rows, share, head, model.head_parameters())
            del hidden
            with ledger.during("backward"):
                total.backward()  # type: ignore[no-untyped-call]
                weights.collect()
        with ledger.during("update"):
            optimizer.update()
        del best, origin
    return ledger.peaks


@contextmanager
def _traced_model(
    config: Any, dtype: torch.dtype, ledger: Ledger, device: str, quantised: bool
) -> Iterator[AdaptedModel]:
    """The base, frozen, on tensors without data that a Recorder watches.

    "cpu": fake CPU tensors, so that every choice of torch's and ours falls as on a CPU. "cuda": meta tensors, for
    which our attention goes its way for devices; torch's fused attention there is stood in for.
    """
    with ExitStack() as stack:
        nf4_pairs(torch.device("cpu" if device == "cpu" else "meta"))  # cached for good: not to be made in here
        stack.enter_context(memory_apart())
        if device == "cpu":
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(Recorder(ledger, "cpu"))
            model = _model(config, dtype)
        else:
            stack.enter_context(Recorder(ledger, "meta"))
            model = meta_model(config, dtype)
            for layer in decoder_layers(model)[1]:
                layer.__dict__["forward"] = partial(_with_fused_attention, layer.forward)
        if quantised:
            _hold_in_nf4(model)
        yield AdaptedModel(Base(model, None, config.model_type))


def _hold_in_nf4(model: PreTrainedModel) -> None:
    """Every layer that `--quant nf4` would hold in 4 bits as one, its tensors of the right sizes and empty.

    On a CPU, where a product has hundreds of tiles, one tile's memory stands in for them.
    """
    device = next(model.parameters()).device
    table = torch.empty(256, dtype=torch.float32, device=device)  # one for all
    for path in quantisable(model):
        layer = emptied(model.get_submodule(path))
        layer.fill(_empty_nf4(layer, next(model.parameters()).dtype, device, table))
        if device.type == "cpu":
            layer.__dict__["matmul"] = partial(_one_tile, layer, layer.out_features)
            layer.__dict__["matmul_t"] = partial(_one_tile, layer, layer.in_features)
        put(model, path, layer.eval())


def _one_tile(layer: Nf4Linear, width: int, x: torch.Tensor) -> torch.Tensor:
    """The product of x [..., n] with a 4-bit layer's weight, or its transpose, as far as memory goes."""
    values = layer.in_features * layer.out_features
    product: torch.Tensor = _OneTile.apply(x, values, width)  # type: ignore[no-untyped-call]
    return product


class _OneTile(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, values: int, width: int) -> torch.Tensor:
        ctx.values, ctx.back = values, x.shape[-1]
        size = min(values, TILE_VALUES)
        out = x.new_empty((*x.shape[:-1], width))
        scales = [x.new_empty(-(-values // BLOCK), dtype=torch.float32) for _ in range(2)]  # looked up, and scaled
        tile = [x.new_empty(size // 2, dtype=torch.int64) for _ in range(2)]  # indices, and pairs of values
        cast = x.new_empty(size)
        del scales, tile, cast
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        product: torch.Tensor = _OneTile.apply(grad, ctx.values, ctx.back)  # type: ignore[no-untyped-call]
        return product, None, None


def _empty_nf4(layer: Nf4Linear, dtype: torch.dtype, device: torch.device, table: torch.Tensor) -> Nf4Weight:
    values = layer.in_features * layer.out_features
    blocks = -(-values // BLOCK)

    def empty(*size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    return Nf4Weight(
        packed=empty(-(-values // 2), 1, dtype=torch.uint8),
        absmax=empty(blocks, dtype=torch.uint8),
        shape=(layer.out_features, layer.in_features),
        dtype=dtype,
        nested_absmax=empty(-(-blocks // NESTED_BLOCK), dtype=torch.float32),
        offset=empty(dtype=torch.float32),
        nested_quant_map=table,
    )


def _trainable(
    model: AdaptedModel, ledger: Ledger, method: str, lora: LoraConfig, tokens: int
) -> tuple[Trainable, Any]:
    """What is trained, its buffers entered in the ledger, and the spans of its pack."""
    with ledger.during("masters"):
        if method == "full":
            full = FullWeights.of(model.model)
            ledger.belongs(full.grad, "gradients")
            for parameter in model.model.parameters():
                parameter.register_post_accumulate_grad_hook(_entering(ledger))
            return full, spans_of(None, tokens)
        resident = model.add("plan", lora.model_copy(update={"dropout": 0.0}))
        weights = AdapterWeights.of(resident)
        ledger.belongs(weights.grad, "gradients")
        return weights, spans_of(resident, tokens)


def _entering(ledger: Ledger) -> Callable[[torch.Tensor], None]:
    """A hook that enters a parameter's own gradient, in the model's dtype, among the gradients."""

    def enter(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            ledger.belongs(parameter.grad, "gradients")

    return enter


def _takes_packs(model: AdaptedModel) -> bool:
    """Whether the architecture runs over a pack with our attention (the probe of `attach`, without its numbers)."""
    ids = torch.zeros(sum(TRIED), dtype=torch.int64, device=model.base.device)
    model.attention_calls = Counter()
    try:
        with torch.no_grad(), model.using(Layout.packed(TRIED)):
            model.hidden(ids, ids.clone())
    except (TypeError, KeyError, ValueError):  # as in adapter/probe.py
        return False
    return set(model.attention_calls.values()) == {1}


def _with_fused_attention(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A decoder layer's forward, in its recomputation too, which a mode around the backward pass does not reach."""
    with _FusedAttention():
        return forward(*args, **kwargs)


class _FusedAttention(TorchFunctionMode):
    """Torch's fused attention as a device runs it: q, k, v, the output and a log-sum per head and row are kept."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Stand in for scaled_dot_product_attention alone."""
        if func is F.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs or {}).values())[:3]
            return _Fused.apply(query, key, value)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def uniform(layers: Sequence[nn.Module], config: Any) -> bool:
    """Whether all decoder layers are of one form, so that a step's bytes are affine in their number."""
    forms = {
        tuple((name, tuple(parameter.shape), parameter.dtype) for name, parameter in layer.named_parameters())
        for layer in layers
    }
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ["same"])
    return len(forms) == 1 and len(kinds) == 1


def with_layers(config: Any, count: int) -> Any:
    """The configuration with `count` decoder layers."""
    out = copy.deepcopy(config)
    text = out.get_text_config()
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types[:count])
    return out
