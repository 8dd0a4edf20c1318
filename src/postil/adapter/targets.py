"""Which modules of a model an adapter's configuration means, and how much of the model that covers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from postil.adapter.config import ALL_LINEAR, ATTENTION, FEED_FORWARD, LoraConfig, pattern_matches
from postil.base import Nf4Linear, decoder_layers, logical_parameters, nf4_layers
from postil.errors import AdapterError, BaseModelError, listed, nearest

Kind = Literal["linear", "conv1d", "embedding"]
# Subclasses of nn.Linear with a forward of their own that is x W^T + b all the same.
DENSE = frozenset({"transformers.models.falcon.modeling_falcon.FalconLinear"})


@dataclass(frozen=True, slots=True)
class Target:
    """One module to adapt: y = module(x) + s·B·A·x with A [rank, d_in], B [d_out, rank]."""

    path: str
    kind: Kind
    d_in: int
    d_out: int
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class Coverage:
    """What an adapter touches: printed before training, so that a missed name is seen."""

    modules: int
    adapted_parameters: int
    trainable: int
    total: int
    names: tuple[str, ...]
    experts_left: tuple[str, ...]

    @property
    def share(self) -> float:
        """Adapted parameters over all parameters of the base."""
        return self.adapted_parameters / max(self.total, 1)

    def lines(self) -> list[str]:
        """The coverage in words."""
        out = [
            f"{self.modules} modules adapted ({', '.join(self.names)}): {self.adapted_parameters:,} of "
            f"{self.total:,} base parameters ({self.share:.1%}) have a note beside them",
            f"{self.trainable:,} trainable parameters ({self.trainable / max(self.total, 1):.3%} of the base, "
            f"{self.trainable * 4 / 1e6:.1f} MB in float32)",
        ]
        if self.experts_left:
            out.append(f"not adapted (3-D expert parameters): {listed(self.experts_left)}")
        return out


def kind_of(module: nn.Module) -> Kind | None:
    """How the module maps its input, or None where no adapter fits (OPT's places, which are no ids; routers;
    quantised layers): the class's own forward is what an adapter stands beside, so it must be the known one."""
    if isinstance(module, Nf4Linear):
        return "conv1d" if module.conv1d else "linear"
    forward = type(module).forward
    if isinstance(module, nn.Linear):
        dense = forward is nn.Linear.forward or _class_name(module) in DENSE
        return "linear" if dense and _plain_weight(module) else None
    if isinstance(module, Conv1D):
        return "conv1d" if forward is Conv1D.forward and _plain_weight(module) else None
    if isinstance(module, nn.Embedding) and _plain_weight(module):
        scaled = hasattr(module, "embed_scale") and len(inspect.signature(forward).parameters) == 2  # Gemma's
        return "embedding" if forward is nn.Embedding.forward or scaled else None
    return None


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _plain_weight(module: nn.Module) -> bool:
    """Whether the weight is an ordinary floating tensor (quantised ones are integers or classes of their own)."""
    weight = module.weight
    return (
        isinstance(weight, torch.Tensor)
        and type(weight) in (nn.Parameter, torch.Tensor, FakeTensor)  # FakeTensor: planning's, without data
        and weight.is_floating_point()
    )


def refuse_foreign(model: PreTrainedModel) -> None:
    """Raise AdapterError, naming one, where linear layers are of a class that neither torch nor a model's own
    code brings (quantised ones): a choice of modules by a word would pass over them in silence."""
    for path, module in model.named_modules():
        own = type(module).forward is not nn.Linear.forward and type(module).__module__.startswith(
            "transformers.models."
        )
        if isinstance(module, nn.Linear) and kind_of(module) is None and not own:
            raise AdapterError(
                f"{path} is a {type(module).__name__} ({module.weight.dtype}), a linear layer with arithmetic of its "
                "own, which has no adapter; load the base unquantised, in float32, bfloat16 or float16"
            )


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of an adaptable module; an embedding maps vocabulary → hidden."""
    if isinstance(module, Nf4Linear):
        return module.in_features, module.out_features
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(module, nn.Linear):
        return int(weight.shape[1]), int(weight.shape[0])
    return int(weight.shape[0]), int(weight.shape[1])


def inner_model(model: PreTrainedModel) -> nn.Module:
    """The module that maps token ids to hidden states. Raises BaseModelError where there is none."""
    found = model.get_decoder()
    if found is model:  # transformers' lookup knows no inner model by its name (Llama 4)
        found = next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)
    if not isinstance(found, nn.Module) or found is model:
        raise BaseModelError(f"{type(model).__name__} has no inner model that gives hidden states")
    return found


def output_head(model: PreTrainedModel) -> nn.Module:
    """The module that maps hidden states to logits."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise BaseModelError(f"{type(model).__name__} has no output head; a causal language model is needed")
    return head


def find_targets(model: PreTrainedModel, config: LoraConfig) -> list[Target]:
    """The modules that `config` means in `model`, in the model's order.

    Raises AdapterError when a name, a pattern or a layer number matches nothing (lists what there is), or
    names a module of a kind that has no adapter.
    """
    modules = dict(model.named_modules())
    chosen = _chosen(model, config, modules)
    chosen = _without_excluded(chosen, config)
    saved = set(saved_paths(model, config))
    chosen = [path for path in chosen if not any(path == s or path.startswith(s + ".") for s in saved)]
    chosen = _in_layers(chosen, config)
    for path in chosen:
        if kind_of(modules[path]) is None:
            raise AdapterError(
                f"target_modules: {path} is a {type(modules[path]).__name__}, which has no adapter; "
                "linear layers, Conv1D and embeddings have one"
            )
    if not chosen:
        raise AdapterError(
            f"no module is left to adapt after exclude_modules, modules_to_save and layers_to_transform; "
            f"there are: {listed(_linear_names(model))}"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            if not any(pattern_matches(pattern, path) for path in chosen):
                raise AdapterError(f"{field}: {pattern!r} matches none of the adapted modules (such as {chosen[0]})")
    return [
        Target(path, kind_of(modules[path]) or "linear", *sizes_of(modules[path]),
               config.rank_of(path), config.scale_of(path))
        for path in chosen
    ]  # fmt: skip


def saved_paths(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """The modules of `modules_to_save`: trained and saved whole. Raises AdapterError for a name without match."""
    if not config.modules_to_save:
        return []
    paths = [path for path, _ in model.named_modules() if path]
    out: list[str] = []
    for name in config.modules_to_save:
        found = [path for path in paths if _named(name, path)]
        if not found:
            raise AdapterError(f"modules_to_save: {name!r} matches no module{nearest(name, _last_parts(paths))}")
        out += found
    for path, _ in nf4_layers(model):
        if any(path == whole or path.startswith(f"{whole}.") for whole in out):
            raise AdapterError(
                f"modules_to_save: {path} is held in 4 bits and cannot be trained whole; leave it out, or load the "
                "base without quant"
            )
    return list(dict.fromkeys(out))


def _chosen(model: PreTrainedModel, config: LoraConfig, modules: dict[str, nn.Module]) -> list[str]:
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted not in (ATTENTION, FEED_FORWARD, ALL_LINEAR):
        found = [path for path in modules if path and re.fullmatch(wanted, path)]
        named = [name.strip() for name in wanted.split(",")]
        if not found and not {*named} - {*_linear_names(model), ATTENTION, FEED_FORWARD, ALL_LINEAR}:
            raise AdapterError(
                f"target_modules: {wanted!r} alone is a pattern for whole module paths; names stand in a list: "
                f"[{', '.join(named)}]"
            )
        if not found:
            raise AdapterError(
                f"target_modules: the pattern {wanted!r} matches no whole module path"
                f"{nearest(wanted, [*_linear_names(model), ATTENTION, FEED_FORWARD, ALL_LINEAR])}; "
                f"paths look like {next(iter(_attention_paths(model)), 'model.layers.0.…')}"
            )
        return found
    names = (wanted,) if isinstance(wanted, str) else wanted or (ATTENTION,)
    found_set: set[str] = set()
    for name in names:
        if name == ATTENTION:
            part = list(_attention_paths(model))
        elif name == FEED_FORWARD:
            part = list(_feed_forward_paths(model))
        elif name == ALL_LINEAR:
            part = _linear_paths(model)
        else:
            part = [path for path in modules if path and _named(name, path)]
        if not part:
            known = [*_linear_names(model), ATTENTION, FEED_FORWARD, ALL_LINEAR]
            raise AdapterError(
                f"target_modules: {name!r} matches no module of this {model.config.model_type} model"
                f"{nearest(name, known)}; there are: {listed(known, 16)}"
            )
        found_set.update(part)
    return [path for path in modules if path in found_set]


def _without_excluded(chosen: list[str], config: LoraConfig) -> list[str]:
    excluded = config.exclude_modules
    if excluded is None:
        return chosen
    if isinstance(excluded, str):
        kept = [path for path in chosen if not re.fullmatch(excluded, path)]
        unused = [excluded] if len(kept) == len(chosen) else []
    else:
        kept = [path for path in chosen if not any(_named(name, path) for name in excluded)]
        unused = [name for name in excluded if not any(_named(name, path) for path in chosen)]
    if unused:
        raise AdapterError(f"exclude_modules: {listed(unused)} excludes nothing that was targeted")
    return kept


def layer_number(path: str, pattern: str | Sequence[str] | None = None) -> int | None:
    """The number of the layer that a path lies in: after `pattern`, or its first numeric part."""
    names = [pattern] if isinstance(pattern, str) else list(pattern or [])
    for name in names:
        match = re.match(rf"(?:.*\.)?{name}\.(\d+)(?:\.|$)", path)
        if match:
            return int(match.group(1))
    if names:
        return None
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _in_layers(chosen: list[str], config: LoraConfig) -> list[str]:
    if config.layers_to_transform is None:
        if config.layers_pattern:
            raise AdapterError("layers_pattern needs layers_to_transform, which was not given")
        return chosen
    value = config.layers_to_transform
    layers = (value,) if isinstance(value, int) else value
    numbers = {path: layer_number(path, config.layers_pattern) for path in chosen}
    missing = [layer for layer in layers if layer not in numbers.values()]
    if missing:
        there = sorted({number for number in numbers.values() if number is not None})
        raise AdapterError(
            f"layers_to_transform: no adapted module lies in layer {listed(missing)}; "
            f"layers found: {f'{there[0]}..{there[-1]}' if there else 'none'}"
        )
    return [path for path in chosen if numbers[path] in layers]


def _named(name: str, path: str) -> bool:
    return path == name or path.endswith("." + name)


def _last_parts(paths: Sequence[str]) -> list[str]:
    return sorted({path.rsplit(".", 1)[-1] for path in paths})


def _linear_paths(model: PreTrainedModel) -> list[str]:
    refuse_foreign(model)
    head = output_head(model)
    return [
        path
        for path, module in model.named_modules()
        if kind_of(module) in ("linear", "conv1d") and module is not head
    ]


def _linear_names(model: PreTrainedModel) -> list[str]:
    return _last_parts(_linear_paths(model))


def _attention_modules(model: PreTrainedModel) -> Iterator[str]:
    prefix, layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        for name, module in layer.named_children():
            if "attn" in name.lower() or "attention" in type(module).__name__.lower():
                yield f"{prefix}.{index}.{name}"


def _attention_paths(model: PreTrainedModel) -> Iterator[str]:
    parents = tuple(path + "." for path in _attention_modules(model))
    return (path for path in _linear_paths(model) if path.startswith(parents))


def _feed_forward_paths(model: PreTrainedModel) -> Iterator[str]:
    prefix, _ = decoder_layers(model)
    parents = tuple(path + "." for path in _attention_modules(model))
    for path in _linear_paths(model):
        router = path.rsplit(".", 1)[-1] in ("router", "gate")
        if path.startswith(prefix + ".") and not path.startswith(parents) and not router:
            yield path


def coverage_of(model: PreTrainedModel, targets: Sequence[Target], trainable: int) -> Coverage:
    """How much of `model` the targets touch."""
    experts = [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and "expert" in name]
    return Coverage(
        modules=len(targets),
        adapted_parameters=sum(target.d_in * target.d_out for target in targets),
        trainable=trainable,
        total=logical_parameters(model),
        names=tuple(dict.fromkeys(target.path.rsplit(".", 1)[-1] for target in targets)),
        experts_left=tuple(experts),
    )
