"""Mixed batches equal each request's own run on merged weights; errors; the base stays bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from postil.adapter import attach, detach
from postil.base import live_digest
from postil.engine import Answer, Engine, Request
from postil.errors import AdapterError, RequestError

KINDS = ("llama", "gemma2", "gpt2", "falcon")
NAMES = (None, "one", "four", "eight")
CLOSE = 1e-4  # a smaller margin between two tokens is no defined greedy choice


def mixed(count: int = 24, **settings: Any) -> list[Request]:
    """Requests of many lengths, adapters and the base interleaved."""
    chance = np.random.default_rng(3)
    return [
        Request(
            ids=tuple(int(token) for token in chance.integers(0, 256, 1 + (n * 7) % 30)),
            adapter=NAMES[n % 4],
            max_new_tokens=1 + (n * 5) % 17,
            **settings,
        )
        for n in range(count)
    ]


def differences(answer: Answer, wanted: Sequence[int], ended: bool) -> int:
    """0 when the tokens agree, 1 when they part where two tokens are as good as equal; else it fails."""
    found = [*answer.ids, *([-1] if answer.finish_reason == "stop" else [])]
    hoped = [*wanted, *([-1] if ended else [])]
    parted = next((n for n, pair in enumerate(zip(found, hoped, strict=False)) if pair[0] != pair[1]), None)
    if parted is None:
        assert found == hoped
        return 0
    assert answer.margins[parted] < CLOSE, (parted, found, hoped)
    return 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_equals_every_solo_run(
    kind: str, make_base: Callable[..., Any], make_adapters: Callable[..., Any], merged_greedy: Callable[..., Any]
) -> None:
    base = make_base(kind)
    adapters = make_adapters(base)
    before = live_digest(base.model)
    requests = mixed()
    with Engine(base, adapters) as engine:
        assert engine.model.packs == (kind != "falcon")
        answers = engine.run(requests)
        few = Engine(engine.model, max_batch=4).run(requests)
        alone = [engine.run([request])[0] for request in requests[:4]]
    assert live_digest(base.model) == before
    close = 0
    for request, answer, other in zip(requests, answers, few, strict=True):
        wanted, ended = merged_greedy(base, adapters.get(request.adapter), request.ids, request.max_new_tokens)
        close += differences(answer, wanted, ended) + differences(other, wanted, ended)
        assert answer.prompt_tokens == len(request.ids)
        assert answer.adapter == request.adapter
    for answer, solo in zip(answers, alone, strict=False):
        close += differences(answer, solo.ids, solo.finish_reason == "stop")
    assert close <= 1
    assert len({answer.ids[0] for answer in answers if answer.ids}) > 3  # the models do say different things


@pytest.mark.parametrize(
    ("kind", "packs"),
    [
        ("deepseek_v3", True),  # values of another size than keys
        ("diffllama", False),  # asks for attention twice a layer
        ("openai-gpt", False),  # keeps no keys
    ],
)
def test_odd_architectures_answer_as_by_themselves(
    kind: str, packs: bool, make_base: Callable[..., Any], merged_greedy: Callable[..., Any]
) -> None:
    base = make_base(kind)
    prompts = [(5, 9, 30), (7,), (100, 3, 8, 41, 60)]
    with Engine(base) as engine:
        assert engine.model.packs == packs
        answers = engine.run([Request(ids=ids, max_new_tokens=8) for ids in prompts])
    close = sum(
        differences(answer, *merged_greedy(base, None, ids, 8)) for answer, ids in zip(answers, prompts, strict=True)
    )
    assert close <= 1


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_each_answer_is_told_once_as_soon_as_it_is_finished(
    kind: str, make_base: Callable[..., Any], make_adapters: Callable[..., Any]
) -> None:
    base = make_base(kind)
    told: dict[int, Answer] = {}
    counts: list[tuple[int, int]] = []

    def finished(place: int, answer: Answer) -> None:
        assert place not in told
        told[place] = answer

    with Engine(base, make_adapters(base), max_batch=4) as engine:
        answers = engine.run(mixed(12), lambda done: counts.append((done, len(told))), finished)
    assert [told[place] for place in range(12)] == answers
    assert all(done == known for done, known in counts)
    assert len(set(counts)) > 4  # as they come, not at the end


def test_adapters_change_the_answers(make_base: Callable[..., Any], make_adapters: Callable[..., Any]) -> None:
    base = make_base("llama")
    with Engine(base, make_adapters(base)) as engine:
        answers = engine.run([Request(ids=(1, 2, 3), adapter=name, max_new_tokens=8) for name in NAMES])
    assert len({answer.ids for answer in answers}) == 4


def test_a_row_stops_by_itself(make_base: Callable[..., Any]) -> None:
    base = make_base("llama")
    with Engine(base) as engine:
        free = engine.run([Request(ids=(5, 6), max_new_tokens=12)])[0]
        stopper = free.ids[3]
        first = free.ids.index(stopper)
    base.model.generation_config.eos_token_id = [257, stopper]
    with Engine(base) as engine:
        ended, other = engine.run([Request(ids=(5, 6), max_new_tokens=12), Request(ids=(9,), max_new_tokens=3)])
    assert free.finish_reason == "length"
    assert ended.finish_reason == "stop"
    assert ended.ids == free.ids[:first]
    assert len(ended.margins) == first + 1
    assert len(other.ids) <= 3


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_a_sampled_row_does_not_depend_on_its_mates(
    kind: str, make_base: Callable[..., Any], make_adapters: Callable[..., Any]
) -> None:
    base = make_base(kind)
    mates = mixed(8, temperature=1.5, seed=4)
    request = Request(ids=(8, 9), adapter="four", temperature=1.3, top_p=0.9, top_k=40, seed=21, max_new_tokens=16)
    with Engine(base, make_adapters(base), max_batch=5) as engine:
        alone = engine.run([request])[0]
        crowd = engine.run([*mates[:5], request, *mates[5:]])[5]
        greedy = engine.run([Request(ids=(8, 9), adapter="four", max_new_tokens=16)])[0]
    assert alone.ids == crowd.ids
    assert alone.ids != greedy.ids


def test_log_probabilities_are_the_models(make_base: Callable[..., Any]) -> None:
    base = make_base("gpt2")
    with Engine(base) as engine:
        answer = engine.run([Request(ids=(4, 5, 6), max_new_tokens=5, logprobs=True)])[0]
    whole = torch.tensor([[4, 5, 6, *answer.ids]])
    wanted = base.model(input_ids=whole).logits[0].log_softmax(-1)
    for place, (token, logprob) in enumerate(zip(answer.ids, answer.logprobs or (), strict=True)):
        assert logprob == pytest.approx(float(wanted[2 + place, token]), abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "falcon"])
def test_the_work_of_finished_rows_is_not_done(kind: str, make_base: Callable[..., Any]) -> None:
    base = make_base(kind)
    base.model.generation_config.eos_token_id = None
    rows: list[int] = []
    base.model.get_input_embeddings().register_forward_hook(lambda _m, args, _y: rows.append(args[0].numel()))
    with Engine(base) as engine:
        rows.clear()
        answers = engine.run([Request(ids=(1, 2, 3), max_new_tokens=count) for count in (1, 2, 6)])
    assert [len(answer.ids) for answer in answers] == [1, 2, 6]
    assert rows == ([9, 2, 1, 1, 1, 1] if kind == "llama" else [3, 3, 1, 3, 1, 1, 1, 1, 1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ids": ()}, "request 2 has an empty prompt"),
        ({}, "request 2 gives none"),
        ({"ids": (1,), "adapter": "fuor"}, r"request 2: no adapter 'fuor' \(did you mean 'four'\?\)"),
        ({"ids": (1,) * 100, "max_new_tokens": 29}, "request 2: 100 prompt tokens and 29 new ones .* of 128"),
        ({"ids": (260,)}, "token id 260 lies outside the vocabulary of 260"),
        ({"prompt": "hello"}, "request 2 is text, but the base has no tokenizer"),
        ({"ids": (1,), "stop": ("x",)}, "no tokenizer"),
        ({"ids": (1,), "max_new_tokens": 0}, "max_new_tokens"),
        ({"ids": (1,), "temperature": float("nan")}, "temperature"),
        ({"ids": (1,), "top_p": 0.0}, "top_p"),
        ({"ids": (1,), "top_k": -1}, "top_k"),
    ],
)
def test_impossible_requests(
    settings: dict[str, Any], message: str, make_base: Callable[..., Any], make_adapters: Callable[..., Any]
) -> None:
    base = make_base("llama")
    with Engine(base, make_adapters(base)) as engine, pytest.raises(RequestError, match=message):
        engine.run([Request(ids=(1,), max_new_tokens=4), Request(**{"max_new_tokens": 4} | settings)])


def test_a_full_context_is_served(make_base: Callable[..., Any]) -> None:
    with Engine(make_base("gemma2")) as engine:
        assert len(engine.run([Request(ids=(3,) * 100, max_new_tokens=28)])[0].margins) > 0


def test_closing_takes_off_what_was_attached_and_no_more(
    make_base: Callable[..., Any], make_adapters: Callable[..., Any]
) -> None:
    base = make_base("llama")
    adapters = make_adapters(base)
    model = attach(base, adapters["one"], name="mine")
    with Engine(model, {"theirs": adapters["four"]}) as engine:
        assert engine.adapters == ["mine", "theirs"]
        assert list(model.active) == ["mine"]
    assert list(model.residents) == ["mine"]
    with pytest.raises(RequestError, match="closed"):
        engine.run([Request(ids=(1,))])
    adapters["eight"].tensors.popitem()
    with pytest.raises(AdapterError):
        Engine(model, {"theirs": adapters["four"], "broken": adapters["eight"]})
    assert list(model.residents) == ["mine"]
    detach(model)
    Engine(base).close()
