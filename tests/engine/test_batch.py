"""Rows beside each other: one that breaks off harms nobody; an adapter that goes takes only its own rows along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from postil.adapter import Adapter, LoraConfig, attach, detach
from postil.base import Base
from postil.engine import Answer, Engine, Request, unbroken
from postil.errors import AnswerError

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# How far log-probabilities of the same tokens may lie apart, a row alone and among others. Attention gives both the
# same up to the order of float32 sums; torch's own products (of the projections, the MLP, the head) sum in another
# order for another number of rows, which in 16 bits rounds another way now and then, and later layers take it up.
APART = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}


def in_dtype(base: Base, dtype: torch.dtype) -> Base:
    """The same base in another dtype, one that never ends an answer by itself."""
    base.model.generation_config.eos_token_id = None
    return Base(base.model.to(dtype), base.tokenizer, base.source)


def overflowing(base: Base, modules: Sequence[str]) -> Adapter:
    """An adapter of finite float32 numbers whose products are not finite in any dtype."""
    model = attach(base)
    model.add("evil", LoraConfig(r=4, target_modules=tuple(modules)), seed=1)
    adapter = model.export("evil")
    detach(model)
    chance = torch.Generator().manual_seed(3)
    for key, tensor in adapter.tensors.items():
        if "lora_B" in key:
            tensor.copy_((torch.rand(tensor.shape, generator=chance) * 2 - 1) * 3e38)
        assert tensor.isfinite().all()
    return adapter


def crowd(count: int = 48) -> list[Request]:
    """Requests of many lengths; every eighth is the evil adapter's, the others of good ones and of the base."""
    chance = np.random.default_rng(5)
    names = (None, "four", "evil", "one", None, "four", None, "eight")
    return [
        Request(
            ids=tuple(int(token) for token in chance.integers(0, 256, int(chance.integers(3, 70)))),
            adapter=names[n % 8],
            max_new_tokens=int(chance.integers(1, 20)),
            logprobs=True,
        )
        for n in range(count)
    ]


def same(answer: Answer, alone: Answer, bound: float) -> None:
    """The same answer, up to where two tokens are as good as equal within the bound."""
    assert answer.finish_reason == alone.finish_reason != "error"
    assert np.isfinite(answer.margins).all()
    pairs = list(zip(answer.ids, alone.ids, strict=True))
    parted = next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
    assert parted == len(pairs) or alone.margins[parted] <= 2 * bound
    for a, b in list(zip(answer.logprobs or (), alone.logprobs or (), strict=True))[:parted]:
        assert abs(a - b) <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("modules", [("k_proj", "v_proj"), ("down_proj",)])
@pytest.mark.parametrize(("first", "places"), [(True, 8), (False, 8), (False, 1)])
def test_a_row_that_overflows_ends_alone(
    dtype: torch.dtype,
    modules: Sequence[str],
    first: bool,
    places: int,
    make_base: Callable[..., Any],
    make_adapters: Callable[..., Any],
) -> None:
    base = in_dtype(make_base("llama"), dtype)
    good, evil = make_adapters(base), {"evil": overflowing(base, modules)}
    requests = crowd()
    with Engine(base, evil | good if first else good | evil, max_batch=places) as engine:
        answers = engine.run(requests)
        alone = {n: engine.run([requests[n]])[0] for n in (0, 1, 3, 7, 9, 33)}
    for n, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        if request.adapter == "evil":
            assert (answer.finish_reason, answer.ids) == ("error", ())
            assert "adapter 'evil' gave values that are not finite" in str(answer.error)
        else:
            assert answer.error is None
            same(answer, alone.get(n, answer), APART[dtype])


@pytest.mark.parametrize("kind", ["llama", "gemma2", "falcon"])
def test_an_answer_that_breaks_off_says_so_everywhere(
    kind: str, make_base: Callable[..., Any], tokenizer: Any
) -> None:
    base = in_dtype(make_base(kind, tokenizer), torch.float32)
    with Engine(base) as engine:
        asked, other = Request(prompt="hm", raw=True, max_new_tokens=9), Request(ids=(1,), max_new_tokens=1)
        free = engine.run([asked])[0]
        known = {*tokenizer("hm")["input_ids"], 1}
        poisoned = {next(token for token in free.ids[2:] if token not in known)}
        broken = min(free.ids.index(token) for token in poisoned) + 1

        def poison(_module: Any, ids: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
            return out.masked_fill(torch.isin(ids[0], torch.tensor(sorted(poisoned)))[..., None], float("nan"))

        base.model.get_input_embeddings().register_forward_hook(poison)
        half, whole = engine.run([asked, other])
        assert half.ids == free.ids[:broken]
        assert (half.finish_reason, len(half.margins)) == ("error", broken)
        assert f"the base gave values that are not finite (NaN or infinite) after {broken} tokens" in str(half.error)
        assert half.text == free.text[: len(half.text)] != ""
        assert unbroken([whole]) == [whole]
        with pytest.raises(AnswerError, match=r"not finite.*\(1 of 2 answers broke off\)"):
            unbroken([half, whole])
        told: list[str] = []
        with pytest.raises(AnswerError, match="not finite"):
            told.extend(engine.stream(asked))
        assert "".join(told) == half.text
        poisoned |= known
        for ask in (engine.generate, engine.chat):
            with pytest.raises(AnswerError, match="after 0 tokens"):
                ask("hm", max_new_tokens=9)


@pytest.mark.parametrize("kind", ["llama", "falcon"])
@pytest.mark.parametrize("given_away", [True, False])
def test_an_adapter_that_goes_takes_its_own_rows_along(
    kind: str, given_away: bool, make_base: Callable[..., Any], make_adapters: Callable[..., Any]
) -> None:
    base = in_dtype(make_base(kind), torch.float32)
    adapters = make_adapters(base)
    names = ("four", None, "one")
    requests = [Request(ids=(5, 6, n), adapter=name, max_new_tokens=12) for n, name in enumerate(names)]
    waiting = [Request(ids=(9, 9), adapter="four", max_new_tokens=3), Request(ids=(9, 9), max_new_tokens=3)]
    with Engine(base, adapters, max_batch=3) as engine:
        wanted = engine.run([*requests, *waiting])
        steps = 0

        def done(_finished: int) -> None:
            nonlocal steps
            steps += 1
            if steps == 3:
                engine.model.remove("four")
                if given_away:
                    engine.model.add("four", adapters["eight"])

        found = engine.run([*requests, *waiting], done)
        if not given_away:
            engine.model.add("four", adapters["four"])
    for n in (0, 3):
        assert (found[n].finish_reason, found[n].ids) == ("error", wanted[n].ids[: len(found[n].ids)])
        assert "adapter 'four' was removed while its answer was being written" in str(found[n].error)
    assert (len(found[0].ids), len(found[3].ids)) == (3, 0)
    for n in (1, 2, 4):
        assert (found[n].ids, found[n].finish_reason) == (wanted[n].ids, wanted[n].finish_reason)


def test_a_stream_does_not_go_on_with_another_adapter(
    make_base: Callable[..., Any], make_adapters: Callable[..., Any], tokenizer: Any
) -> None:
    base = in_dtype(make_base("llama", tokenizer), torch.float32)
    adapters = make_adapters(base)
    request = Request(prompt="hello", raw=True, adapter="four", max_new_tokens=20)
    with Engine(base, adapters) as engine:
        whole = engine.run([request])[0].text
        pieces = engine.stream(request)
        told = [next(pieces), next(pieces)]
        engine.model.remove("four")
        engine.model.add("four", adapters["one"])
        with pytest.raises(AnswerError, match="adapter 'four' was removed"):
            told.extend(pieces)
        assert whole.startswith("".join(told))
        assert engine.run([request])[0].error is None  # the new one answers what is asked now


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_a_row_alone_is_the_row_among_others(
    dtype: torch.dtype, kind: str, make_base: Callable[..., Any], make_adapters: Callable[..., Any]
) -> None:
    base = in_dtype(make_base(kind), dtype)
    adapters = make_adapters(base)
    requests = [request for request in crowd(24) if request.adapter != "evil"]
    with Engine(base, adapters, max_batch=16) as engine:
        for request, answer in zip(requests, engine.run(requests), strict=True):
            same(answer, engine.run([request])[0], APART[dtype])
