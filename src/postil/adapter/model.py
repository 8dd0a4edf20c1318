"""AdaptedModel: a frozen base with its resident adapters, and the one way to run it over a flat batch."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from postil.adapter.adapter import Adapter
from postil.adapter.bank import Resident
from postil.adapter.config import LoraConfig
from postil.adapter.layers import (
    OWNER,
    attention_modules,
    layer_forward,
    length_dependent_rotaries,
    our_attention,
    owned,
    plain_forward,
    rotary_forward,
)
from postil.adapter.linear import slow_projections
from postil.adapter.residents import resident_of
from postil.adapter.targets import Coverage, coverage_of, inner_model, output_head
from postil.adapter.turn import Turn
from postil.adapter.wiring import Wiring
from postil.base import Base, decoder_layers
from postil.errors import AdapterError, InternalError, listed, nearest
from postil.kernels.layout import Layout, Span, Spans
from postil.kernels.loss import cross_entropy
from postil.kernels.loss.reference import Head


class AdaptedModel:
    """A base and the adapters stuck on it. Made by `attach`, undone by `detach`.

    Inside `using(layout)` the model runs over a flat batch with the layout's spans; outside it, a plain
    forward call of the transformers model uses the active adapters on every row. `packs`: whether sequences run
    packed, or one at a time through transformers' own attention. `notes`: what the last `attach` has to say
    about the adapter's fit, in sentences for the user. `turn`: what runs the model or changes its adapters holds it,
    so threads come one after another; `active` is the model's, not a thread's.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self.model: PreTrainedModel = base.model
        self.head = output_head(self.model)
        self.decoder = inner_model(self.model)
        self.residents: dict[str, Resident] = {}
        self.active: dict[str, float] = {}
        self.turn = Turn()
        self.layout: Layout | None = None
        self.spans_now: Spans | None = None
        self.checkpointing = False
        self.packs = True
        self.attention_calls: Counter[Any] = Counter()  # by layer, since they were last counted
        self.notes: list[str] = []
        self.detached = False
        self.merged: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        self.active_before_merge: dict[str, float] = {}
        self._given_slots = 0
        self._wiring = Wiring(self.model, self.spans_in_force, self.tokens_in_force)
        self._attention = attention_modules(self.model)
        for module in self._attention:
            module.__dict__[OWNER] = self
        for module, projection in slow_projections(self.model):
            self._wiring.stand_in(module, projection.matmul)
        for layer in decoder_layers(self.model)[1]:
            self._wiring.stand_in(layer, owned(layer_forward, self, layer.forward))
        for rotary in length_dependent_rotaries(self.model):
            self._wiring.stand_in(rotary, owned(rotary_forward, self, rotary.forward, rotary))
        self._wiring.stand_in(self.model, owned(plain_forward, self, self.model.forward))

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise AdapterError(
            "a model with adapters attached cannot be copied or pickled: save the adapter (save_adapter), detach, "
            "copy the base, and attach the adapter to the copy"
        )

    def forget(self) -> None:
        """Let go of activations that modules keep for each other within a pass."""
        self._wiring.forget()

    def versions(self, spans: Spans) -> dict[int, int]:
        """How often the values of the adapters of these spans were written to, by slot (inference tensors count
        nothing)."""
        slots = {item.slot for item in spans.items}
        found = [resident for resident in self.residents.values() if resident.slot in slots]
        return {one.slot: 0 if one.flat.is_inference() else one.flat._version for one in found}

    def take_off(self) -> None:
        """Give every module its own forward back; the base is as it was before `attach`."""
        self._wiring.take_off()
        for module in self._attention:
            module.__dict__.pop(OWNER, None)
        self.detached = True
        self.layout = self.spans_now = None
        self.checkpointing, self.packs, self.attention_calls = False, True, Counter()
        for kept in (self.merged, self.active_before_merge, self.residents, self.active):
            kept.clear()

    def check_attached(self) -> None:
        """Raise AdapterError when the model was taken off its base."""
        if self.detached:
            raise AdapterError("this AdaptedModel is detached from its base; attach an adapter to the base again")

    # -- adapters -----------------------------------------------------------------------------------------

    def add(self, name: str, source: LoraConfig | Adapter, *, seed: int = 0) -> Resident:
        """Make an adapter resident: a fresh one from a LoraConfig, or a loaded one. Raises AdapterError, and then
        leaves the model as it was."""
        self.check_attached()
        with self.turn:
            if name in self.residents:
                raise AdapterError(f"an adapter {name!r} is already attached; remove it first or choose another name")
            if self.merged:
                raise AdapterError("an adapter is merged into the base; unmerge it before attaching another")
            resident, grouping = resident_of(self.model, name, self._given_slots, source, seed, self.base.device)
            self._given_slots += 1  # a number never comes again: what still holds one that is gone can be told
            self._wiring.put(resident, grouping)
            self.residents[name] = resident
        return resident

    def remove(self, name: str) -> None:
        """Let go of an adapter: its memory is free at once.

        Whatever still names its slot (a Layout, a row on its way, a backward pass) is an AdapterError from now on.
        """
        with self.turn:
            resident = self.resident(name)
            if self.layout is not None:
                raise AdapterError(f"the model is running; remove {name!r} afterwards")
            self._wiring.take(resident)
            del self.residents[name]
            self.active.pop(name, None)

    def holds(self, slot: int) -> bool:
        """Whether the adapter that was given this slot is still attached."""
        return any(resident.slot == slot for resident in self.residents.values())

    def check_spans(self, spans: Spans, what: str = "these rows were laid out; lay them out again") -> None:
        """Raise AdapterError where a span's adapter was removed: its rows would silently get the bare base."""
        if gone := {item.slot for item in spans.items} - {resident.slot for resident in self.residents.values()}:
            raise AdapterError(
                f"the adapter of slot {min(gone)} was removed after {what} (attached: {listed(self.residents)})"
            )

    def resident(self, name: str) -> Resident:
        """The resident adapter of that name. Raises AdapterError with the nearest name."""
        self.check_attached()
        if name not in self.residents:
            raise AdapterError(
                f"no adapter {name!r} is attached{nearest(name, self.residents)}; attached: {listed(self.residents)}"
            )
        return self.residents[name]

    def activate(self, *names: str | Mapping[str, float], **weights: float) -> None:
        """Choose the adapters of plain forward calls: one, none, or a weighted combination.

        Names count once; weights as keywords, or as a mapping where a name is no identifier:
        `activate({"my-note": 0.5, "b": 0.5})`. Raises AdapterError.
        """
        self.check_attached()
        chosen: dict[str, float] = {}
        for name in names:
            chosen |= {name: 1.0} if isinstance(name, str) else name
        chosen |= weights
        if chosen and self.merged:
            raise AdapterError("an adapter is merged into the base; unmerge it before activating one")
        self.check_combination(chosen)
        self.active = chosen

    def check_combination(self, weights: Mapping[str, float]) -> None:
        """Raise AdapterError when a name is unknown, a weight not finite, or adapters cannot be active together."""
        for name, weight in weights.items():
            if not math.isfinite(weight):
                raise AdapterError(f"the weight of {name!r} is {weight}; give a finite number")
        whole = [name for name, weight in weights.items() if self.resident(name).saved and weight]
        if whole and sum(map(bool, weights.values())) > 1:
            raise AdapterError(f"{listed(whole)} replaces whole modules and cannot be combined with others")

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The bare base within this block. Raises AdapterError while an adapter is merged into it."""
        self.check_attached()
        if self.merged:
            raise AdapterError("an adapter is merged into the base; unmerge it to run the bare base")
        before, self.active = self.active, {}
        try:
            yield
        finally:
            self.active = before

    def export(self, name: str) -> Adapter:
        """A copy of a resident adapter as plain data (float32, on the CPU)."""
        resident = self.resident(name)
        fingerprint = self.base.fingerprint()
        conv1d = any(target.kind == "conv1d" for target in resident.targets)
        return Adapter(
            config=resident.config,
            tensors={key: view.detach().cpu().clone() for key, view in resident.keys.items()},
            base={"source": fingerprint.source, "form": fingerprint.form},
            base_name=self.base.source,
            card=copy.deepcopy(resident.card) | ({"fan_in_fan_out": True} if conv1d else {}),
        )

    def coverage(self, name: str) -> Coverage:
        """What an adapter touches."""
        resident = self.resident(name)
        return coverage_of(self.model, resident.targets, resident.parameters)

    # -- running ------------------------------------------------------------------------------------------

    def spans_in_force(self, rows: int) -> Spans:
        """The spans in force for a module that is given `rows` rows."""
        if self.spans_now is not None:
            return self.spans_now
        if self.layout is not None:
            if rows != self.layout.tokens and self.layout.spans.items:
                raise AdapterError(
                    f"{type(self.model).__name__} gives an adapted module {rows} rows for {self.layout.tokens} "
                    "tokens, so that whose they are is not known; leave such modules out of target_modules"
                )
            return self.layout.spans
        return self.spans_for(self.active, rows)

    @property
    def shares_beginnings(self) -> bool:
        """Whether sequences that begin alike may have their beginning once: not where one is run at a time, nor where
        the rotary frequencies of its tokens depend on how long a sequence is."""
        return self.packs and not length_dependent_rotaries(self.model)

    def tokens_in_force(self) -> int | None:
        """The tokens of the flat batch in force; None in a plain call, and where the head is given chosen rows."""
        return self.layout.tokens if self.layout is not None and self.spans_now is None else None

    def spans_for(self, weights: Mapping[str, float], rows: int) -> Spans:
        """All of `rows` rows with the named adapters at these weights."""
        return Spans.of(Span(0, rows, self.resident(name).slot, scale) for name, scale in weights.items() if scale)

    @contextmanager
    def using(self, layout: Layout) -> Iterator[None]:
        """Run over a flat batch with this layout; does not nest, and other threads wait for their turn."""
        self.check_attached()
        with self.turn:
            if self.layout is not None:
                raise InternalError("a Layout is in force already; they do not nest")
            if layout.spans.items and self.merged:
                raise AdapterError("an adapter is merged into the base; unmerge it before answering with adapters")
            with self.under(layout, None):
                yield

    @contextmanager
    def under(self, layout: Layout, spans: Spans | None) -> Iterator[None]:
        """This Layout (and for the head these spans) in force, over what is: one pass, or its recomputation.

        A recomputation on the CPU waits for its turn; on a device autograd has a thread of its own, whose caller may
        have it.
        """
        with self.turn if self.base.device.type == "cpu" else nullcontext():
            self.check_spans(layout.spans if spans is None else spans)
            before = self.layout, self.spans_now
            self.layout, self.spans_now = layout, spans
            try:
                with our_attention(self._attention) if self.packs else nullcontext():
                    yield
            finally:
                self.layout, self.spans_now = before
                self.forget()

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Hidden states [tokens, dim] of a flat batch (ids, positions: int64 [tokens]), inside `using`."""
        if self.layout is None:
            raise InternalError("hidden() needs a Layout in force")
        if self.packs:
            out = self.decoder(
                input_ids=ids[None],
                position_ids=positions[None],
                attention_mask=None,
                past_key_values=None,
                use_cache=False,
            )
            return self._watched(out.last_hidden_state[0])
        if self.layout.store is not None:
            raise InternalError("this architecture keeps no packed key-value store")
        parts = []
        for segment in self.layout.segments:
            own = range(segment.q0, segment.q1)
            rows = [*(row for part in segment.prefix for row in range(*part)), *own]  # its beginning again, with it
            layout = Layout.packed([len(rows)], self.layout.spans.take(rows))
            with self.under(layout, None):
                out = self.decoder(input_ids=ids[None, rows], use_cache=False)
                parts.append(out.last_hidden_state[0, len(rows) - len(own) :])
        return self._watched(torch.cat(parts))

    def _watched(self, states: torch.Tensor) -> torch.Tensor:
        """The states, whose backward pass begins with a look whether every adapter of the forward pass is there."""
        assert self.layout is not None
        spans = self.layout.spans
        if states.requires_grad and spans.items:
            backward = partial(self._check_backward, spans)
            states.register_hook(backward)  # type: ignore[no-untyped-call]
        return states

    def _check_backward(self, spans: Spans, _gradient: torch.Tensor) -> None:
        self.check_spans(spans, "the forward pass; go backward before removing it")

    def logits(self, hidden: torch.Tensor, spans: Spans) -> torch.Tensor:
        """Logits [rows, vocabulary] of hidden states, the head's own scale and soft cap applied."""
        layout = self.layout
        if layout is None:
            raise InternalError("logits() needs a Layout in force")
        self.check_spans(spans)
        before, self.spans_now = self.spans_now, spans
        try:
            logits: torch.Tensor = self.head(hidden)
        finally:
            self.spans_now = before
        return _scaled(logits, self.model.config.get_text_config())

    def loss(
        self, ids: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(sum of weight·nll, nll per target, rows of the targets) of a pack, inside `using`.

        weights: float32 [tokens], the loss weight of predicting each token from those before it.
        """
        targets = torch.nonzero(weights, as_tuple=True)[0]
        hidden = self.hidden(ids, positions)
        rows = targets - 1  # the state before a token predicts it
        total, nll = cross_entropy(
            hidden.index_select(0, rows), ids[targets], weights[targets], self.head_on(rows), self.head_parameters()
        )
        return total, nll, targets

    def head_on(self, rows: torch.Tensor) -> Head:
        """The head as the kernels call it, for states of these rows (ascending) of the flat batch."""
        assert self.layout is not None
        spans = self.layout.spans.take(rows.cpu().numpy())

        def head(chunk: torch.Tensor, start: int, end: int) -> torch.Tensor:
            return self.logits(chunk, spans.within(start, end))

        return head

    def head_parameters(self) -> list[torch.Tensor]:
        """The tensors behind the head that want a gradient."""
        found: list[torch.Tensor] = [p for p in self.head.parameters() if p.requires_grad]
        path = next((path for path, module in self.model.named_modules() if module is self.head), None)
        for resident in self.residents.values():
            group = resident.groups.get(self._wiring.group_at(path or "") or "")
            if group is not None:
                found += [tensor for tensor in group.tensors() if tensor is not None and tensor.requires_grad]
            found += [t for t in resident.saved.get(path or "", {}).values() if t.requires_grad]
        return found


def _scaled(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """Cohere's logit_scale, Granite's logits_scaling, Gemma's final soft cap."""
    scale = getattr(config, "logit_scale", None)
    if scale is not None:
        logits = logits * scale
    divide = getattr(config, "logits_scaling", None)
    if divide is not None:
        logits = logits / divide
    cap = getattr(config, "final_logit_softcapping", None)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits
