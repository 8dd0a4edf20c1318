"""Running an AdaptedModel: adapters that are gone, threads, heads in chunks, recomputation, an `add` that fails."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from postil.adapter import AdaptedModel, LoraConfig, attach, detach
from postil.errors import AdapterError
from postil.kernels.layout import Layout, Span, Spans, positions_of

IDS = torch.arange(3, 15)
POSITIONS = torch.arange(12)
TARGETS = {
    "linear": {"target_modules": ("attention", "down_proj")},
    "embedding": {"target_modules": ("embed_tokens",)},
    "saved": {"modules_to_save": ("norm",), "target_modules": ("o_proj",)},
    "head": {"target_modules": ("lm_head",)},
}


def noted(lab: Any, *names: str, **settings: Any) -> AdaptedModel:
    """A tiny model with adapters of random values, gradients recorded for each."""
    model = attach(lab.tiny())
    for seed, name in enumerate(names, 1):
        model.add(name, LoraConfig(r=4, **settings))
        lab.scramble(model, name, seed=seed)
        model.resident(name).train()
    return model


def spans(model: AdaptedModel, *parts: tuple[str, int, int]) -> Spans:
    return Spans.of(Span(start, end, model.resident(name).slot) for name, start, end in parts)


def loss_of(model: AdaptedModel, layout: Layout) -> torch.Tensor:
    with model.using(layout):
        return model.loss(IDS, POSITIONS, (POSITIONS > 0) / 11)[0]


@pytest.mark.parametrize("given_away", [True, False])
def test_a_layout_whose_adapter_is_gone_does_not_run(given_away: bool, lab: Any) -> None:
    model = noted(lab, "a", "b")
    layout = Layout.packed([12], spans(model, ("a", 0, 5), ("b", 5, 12)))
    stale = layout.spans
    model.remove("a")
    if given_away:
        model.add("a", LoraConfig(r=4))
    with pytest.raises(AdapterError, match="slot 0 was removed after these rows were laid out"), model.using(layout):
        pass
    with model.using(Layout.packed([12])), torch.no_grad():
        states = model.hidden(IDS, POSITIONS)
        with pytest.raises(AdapterError, match="slot 0 was removed"):
            model.logits(states, stale)
    with model.using(
        Layout.packed([12], spans(model, ("b", 5, 12)))
    ):  # what another adapter leaves alone is no fault
        model.hidden(IDS, POSITIONS)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("given_away", [True, False])
def test_no_backward_pass_after_its_adapter_is_gone(
    kind: str, checkpointing: bool, given_away: bool, lab: Any
) -> None:
    model = noted(lab, "a", **TARGETS[kind])
    model.checkpointing = checkpointing
    layout = Layout.packed([12], spans(model, ("a", 0, 12)))
    loss_of(model, layout).backward()
    loss = loss_of(model, layout)
    model.remove("a")
    if given_away:
        model.add("a", LoraConfig(r=4, **TARGETS[kind])).train()
    if kind == "head":  # its gradient is made in the forward pass, and goes where it went: to what is gone
        loss.backward()
    else:
        with pytest.raises(AdapterError, match="was removed after the forward pass; go backward before"):
            loss.backward()
    assert not given_away or not model.resident("a").grad.any()


def test_no_backward_pass_of_a_plain_call_after_its_adapter_is_gone(lab: Any) -> None:
    model = noted(lab, "a")
    model.activate("a")
    out = model.model(input_ids=IDS[None], use_cache=False).logits.sum()
    model.remove("a")
    with pytest.raises(AdapterError, match="was removed after the forward pass"):
        out.backward()


def test_an_adapter_is_not_removed_under_a_pass(lab: Any) -> None:
    model = noted(lab, "a")
    with model.using(Layout.packed([12], spans(model, ("a", 0, 12)))):
        with pytest.raises(AdapterError, match="the model is running; remove 'a' afterwards"):
            model.remove("a")
        model.hidden(IDS, POSITIONS)
    model.remove("a")


def in_threads(*jobs: Callable[[], Any]) -> list[Any]:
    """What each job gave, all of them at once."""
    found: list[Any] = [None] * len(jobs)

    def run(n: int) -> None:
        found[n] = jobs[n]()

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_two_threads_take_turns(lab: Any) -> None:
    """Packed passes with one adapter, plain calls of the active one, and adapters that come and go beside them."""
    model = noted(lab, "a", "b")
    model.activate("b")
    layout = Layout.packed([12], spans(model, ("a", 0, 12)))

    @torch.no_grad()
    def packed() -> torch.Tensor:
        with model.using(layout):
            return model.logits(model.hidden(IDS, POSITIONS), layout.spans)

    def often(job: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        return [job() for _ in range(20)]

    def change() -> None:
        for _ in range(20):
            model.add("c", LoraConfig(r=2, target_modules=("attention", "embed_tokens")))
            model.remove("c")

    wanted, plain = packed(), lab.plain(model, IDS)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    first, second, third, _ = in_threads(
        lambda: often(packed), lambda: often(lambda: lab.plain(model, IDS)), lambda: often(packed), change
    )
    for found in (*first, *third):
        assert torch.equal(found, wanted)
    for found in second:
        assert torch.equal(found, plain)


def test_another_thread_waits_for_a_pass(lab: Any) -> None:
    model = noted(lab, "a")
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait()
        with model.using(Layout.packed([12])):
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with model.using(Layout.packed([12])):
        inside.set()
        assert not done.wait(0.2)
    thread.join()
    assert done.is_set()


def test_a_copy_has_a_turn_of_its_own(lab: Any) -> None:
    model = noted(lab, "a")
    with model.turn:
        other = copy.deepcopy(model.turn)
        assert in_threads(lambda: other.__enter__()) == [None]  # does not wait


@pytest.mark.parametrize("kind", ["head", "saved head"])
def test_every_chunk_of_the_head_has_its_own_spans(kind: str, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one adapter, of none and of another, in chunks that lie within and across them."""
    settings = {"target_modules": ("lm_head",)} if kind == "head" else {"modules_to_save": ("lm_head",)}
    model = noted(lab, "a", "b", **settings)
    lengths = (9, 30, 7, 25)
    users = ("a", None, "b", "a")
    ids = torch.randint(3, 101, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    starts = [sum(lengths[:n]) for n in range(4)]
    parts = [(user, s, s + n) for user, s, n in zip(users, starts, lengths, strict=True) if user]
    layout = Layout.packed(lengths, spans(model, *parts))
    rows = torch.arange(1, sum(lengths), 2)
    with model.using(layout), torch.no_grad():
        states = model.hidden(ids, positions_of(lengths))
        whole = model.logits(states, layout.spans)[rows]
        head = model.head_on(rows)
        for size in (1, 4, 7, 100):
            edges = [*range(0, len(rows), size), len(rows)]
            found = [head(states[rows[a:b]], a, b) for a, b in itertools.pairwise(edges)]
            torch.testing.assert_close(torch.cat(found), whole, rtol=0, atol=1e-5)


def test_recomputation_runs_with_the_layout_of_its_forward_pass(lab: Any) -> None:
    """Whatever is in force by then: another adapter, other sequences, or nothing."""
    model = noted(lab, "a", "b")
    layout = Layout.packed([5, 7], spans(model, ("a", 0, 5), ("b", 5, 12)))
    other = Layout.packed([12], spans(model, ("b", 0, 12)))

    def gradients(checkpointing: bool, within: Layout | None) -> list[torch.Tensor]:
        model.checkpointing = checkpointing
        residents = [model.resident(name) for name in "ab"]
        for resident in residents:
            resident.train()
        loss = loss_of(model, layout)
        if within is None:
            loss.backward()
        else:
            with model.using(within):
                loss.backward()
        return [resident.grad.clone() for resident in residents if resident.grad is not None]

    wanted = gradients(False, None)
    assert all(part.abs().max() > 1e-4 for part in wanted)
    for within in (None, layout, other):
        for found, want in zip(gradients(True, within), wanted, strict=True):
            torch.testing.assert_close(found, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("broken", ["shape", "missing", "nan"])
def test_an_add_that_fails_leaves_nothing_behind(broken: str, lab: Any) -> None:
    settings = {"target_modules": ("attention", "embed_tokens"), "modules_to_save": ("norm",)}
    model = noted(lab, "a", **settings)
    adapter = model.export("a")
    detach(model)
    key = "model.layers.0.self_attn.q_proj.lora_A.weight"
    tensor = adapter.tensors.pop(key)
    if broken != "missing":
        adapter.tensors[key] = tensor[:2] if broken == "shape" else tensor * float("nan")
    model = attach(model.base)
    before = {path: dict(vars(module)) for path, module in model.model.named_modules()}
    slots = model.add("x", LoraConfig(target_modules=("lm_head",))).slot
    model.remove("x")
    after_one = {path: dict(vars(module)) for path, module in model.model.named_modules()}
    with pytest.raises(AdapterError):
        model.add("a", adapter)
    with pytest.raises(AdapterError):
        model.add("a", LoraConfig(target_modules=("nothing",)))
    assert list(model.residents) == []
    found = {path: dict(vars(module)) for path, module in model.model.named_modules()}
    assert found == after_one
    assert {path for path in before if before[path] != found[path]} == {"lm_head"}
    assert model.add("a", LoraConfig()).slot > slots
