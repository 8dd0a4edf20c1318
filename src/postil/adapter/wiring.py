"""How a model's modules are stood in for: their own forwards kept, groups made once, everything given back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from postil.adapter.bank import Resident
from postil.adapter.linear import AdaptedEmbedding, ReplacedModule, SharedInput, SpansOf, groups_of, projection_of
from postil.adapter.targets import Target
from postil.kernels.adapted_linear import Group


def grouping_of(model: nn.Module, targets: Sequence[Target]) -> dict[str, tuple[str, ...]]:
    """Group name → paths of its members, for every group of projections that a linear target lies in."""
    found: dict[str, tuple[str, ...]] = {}
    known = set[str]()
    for target in targets:
        if target.kind != "embedding" and target.path not in known:
            paths = groups_of(model, target.path)
            found["+".join([paths[0], *(path.rsplit(".", 1)[-1] for path in paths[1:])])] = paths
            known.update(paths)
    return found


@dataclass(slots=True)
class Wiring:
    """The stand-ins of one model: whatever a module's forward was before lies in `forwards`, in order.

    spans_of: rows that a module is given → the spans in force; tokens_of: the tokens of the flat batch in force.
    shared, embeddings, replaced: what stands in, by group name and by module path.
    """

    model: PreTrainedModel
    spans_of: SpansOf
    tokens_of: Callable[[], int | None]
    forwards: list[tuple[nn.Module, Callable[..., Any] | None]] = field(default_factory=list)
    shared: dict[str, SharedInput] = field(default_factory=dict)
    embeddings: dict[str, AdaptedEmbedding] = field(default_factory=dict)
    replaced: dict[str, ReplacedModule] = field(default_factory=dict)

    def stand_in(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Give a module another forward."""
        self.forwards.append((module, module.__dict__.get("forward")))
        module.__dict__["forward"] = forward

    def put(self, resident: Resident, grouping: Mapping[str, tuple[str, ...]]) -> None:
        """Bring an adapter into every module that it touches, making the stand-ins that are not there yet."""
        for name, paths in grouping.items():
            if name not in self.shared:
                self._stand_for_group(name, paths)
        for path in resident.embeddings:
            if path not in self.embeddings:
                module = self.model.get_submodule(path)
                replaced = self.replaced.get(path)
                adapted = AdaptedEmbedding(module, replaced.own if replaced else module.forward, self.spans_of)
                self.embeddings[path] = adapted
                self._stand_within(path, module, adapted.forward)
        for path in resident.saved:
            if path not in self.replaced:
                module = self.model.get_submodule(path)
                own = self._own_forward(module)
                stand = ReplacedModule(module, own, module.forward, self.spans_of, self.tokens_of)
                self.replaced[path] = stand
                self.stand_in(module, stand.forward)
        for group, adapter_slot in resident.groups.items():
            self.shared[group].group.slots[resident.slot] = adapter_slot
        for path, embedding in resident.embeddings.items():
            self.embeddings[path].slots[resident.slot] = embedding
        for path, parameters in resident.saved.items():
            self.replaced[path].slots[resident.slot] = parameters

    def take(self, resident: Resident) -> None:
        """Take an adapter out of every module; the stand-ins stay, and compute as the base does."""
        for group in resident.groups:
            del self.shared[group].group.slots[resident.slot]
        for path in resident.embeddings:
            del self.embeddings[path].slots[resident.slot]
        for path in resident.saved:
            del self.replaced[path].slots[resident.slot]
        self.forget()

    def forget(self) -> None:
        """Let go of activations that members of a group keep for each other."""
        for shared in self.shared.values():
            shared.forget()

    def group_at(self, path: str) -> str | None:
        """The name of the wired group that the projection at `path` is a member of."""
        return next((name for name, shared in self.shared.items() if path in shared.paths), None)

    def take_off(self) -> None:
        """Give every module its own forward back."""
        for module, before in reversed(self.forwards):
            del module.__dict__["forward"]
            if before is not None:
                module.__dict__["forward"] = before
        for kept in (self.forwards, self.shared, self.embeddings, self.replaced):
            kept.clear()

    def _stand_for_group(self, name: str, paths: tuple[str, ...]) -> None:
        modules = [self.model.get_submodule(path) for path in paths]
        shared = SharedInput(Group(name, [projection_of(module) for module in modules]), paths, self.spans_of)
        self.shared[name] = shared
        for index, (path, module) in enumerate(zip(paths, modules, strict=True)):
            self._stand_within(path, module, partial(shared.forward, index))

    def _stand_within(self, path: str, module: nn.Module, forward: Callable[..., Any]) -> None:
        """As `stand_in`, but a replacement of the whole module stays outermost."""
        if path in self.replaced:
            self.replaced[path].original = forward
        else:
            self.stand_in(module, forward)

    def _own_forward(self, module: nn.Module) -> Callable[..., Any]:
        """The module's forward from before `attach`."""
        for other, before in self.forwards:
            if other is module:
                return before or partial(type(module).forward, module)
        forward: Callable[..., Any] = module.forward
        return forward
