"""postil generate and chat: answers with and without notes, one by one or a whole file in one batch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from postil import console
from postil.cli.words import Code
from postil.errors import AnswerError, RequestError

if TYPE_CHECKING:
    from postil.engine import Engine, Request

BaseName = Annotated[str, typer.Option("--base", "-b", help="Model directory, known base, hub name, GGUF.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", "-a", help="A directory, name=directory, or a published NAME@ALIAS; repeatable."),
]
Published = Annotated[
    str | None,
    typer.Option("--registry", envvar="POSTIL_REGISTRY", help="Where NAME@ALIAS is published; or POSTIL_REGISTRY."),
]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Quant = Annotated[str | None, typer.Option(help="nf4: hold the base in 4 bits.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most this many new tokens.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]

Force = Annotated[bool, typer.Option("--force", help="Take adapters made for another base.")]


def generate(
    base: BaseName,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt (a user's turn, or plain text with --raw).")
    ] = None,
    adapter: Adapters = None,
    registry: Published = None,
    requests: Annotated[Path | None, typer.Option(help="A JSONL of requests, each naming its adapter.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the plain text; no chat template.")] = False,
    max_new_tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Decides sampled answers.")] = 0,
    dtype: Dtype = "auto",
    quant: Quant = None,
    device: Device = "auto",
    force: Force = False,
    trust_remote_code: Code = False,
) -> None:
    """Answer a prompt, or every line of a file in one batch.

    A line of --requests: {"prompt": "…", "adapter": "support"} (no adapter: the bare base). An answer that breaks off
    says so in its line (finish_reason "error" and an "error"), the others are whole; the exit code is then 2.
    Example: postil generate "Where is my order?" --base smollm2-135m-instruct --adapter runs/support/adapter
    """
    from postil.cli.requests_file import read_requests
    from postil.engine import Request, unbroken

    if (prompt is None) == (requests is None):
        raise RequestError('give a prompt or --requests FILE, for example: postil generate "Hello" --base B')
    defaults = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "raw": raw}
    asked = read_requests(requests, defaults) if requests is not None else []
    with _engine(base, adapter, registry, dtype, quant, device, force, trust_remote_code) as engine:
        if requests is not None:
            answers = engine.run(_as_learned(engine, asked))
            for answer in answers:
                fields = {"text": answer.text, "adapter": answer.adapter, "finish_reason": answer.finish_reason,
                          "prompt_tokens": answer.prompt_tokens, "new_tokens": len(answer.ids)}  # fmt: skip
                said = {} if answer.error is None else {"error": answer.error}
                typer.echo(json.dumps(fields | said, ensure_ascii=False))
            unbroken(answers)
            return
        one = Request(prompt=prompt, adapter=_only(engine), raw=raw, max_new_tokens=max_new_tokens,
                      temperature=temperature, seed=seed)  # fmt: skip
        _print_stream(engine, *_as_learned(engine, [one]))


def _as_learned(engine: Engine, asked: list[Request]) -> list[Request]:
    """The prompts as their adapters saw them while learning: where rows were plain text, with the separator after."""
    marks = {name: _separator(resident.card) for name, resident in engine.model.residents.items()}
    out, told = [], set[str | None]()
    for request in asked:
        mark, prompt = marks.get(request.adapter or ""), request.prompt
        if mark is None or prompt is None or (request.raw and prompt.endswith(mark)):
            out.append(request)
            continue
        if request.adapter not in told:
            told.add(request.adapter)
            how = "leave --raw out, and it is put there" if request.raw else "so it is asked, with no chat template"
            console.note(f"{request.adapter} learned plain text, {mark!r} between prompt and completion: {how}")
        ended = prompt if prompt.endswith(mark) else prompt + mark
        out.append(request if request.raw else replace(request, prompt=ended, raw=True))
    return out


def _separator(card: Mapping[str, Any]) -> str | None:
    """What stood between prompt and completion in the rows of an adapter that learned plain text; None for others."""
    recipe, data = card.get("recipe"), card.get("data")
    rows = recipe.get("rows") if isinstance(recipe, dict) else None
    if not isinstance(rows, dict) or not isinstance(rows.get("separator"), str):
        return None
    format_ = data.get("format") if isinstance(data, dict) else None
    return rows["separator"] if (format_ or rows.get("format")) == "raw" else None


def chat(
    base: BaseName,
    adapter: Adapters = None,
    registry: Published = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Tokens = 256,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Decides sampled answers; each turn takes the next one.")] = 0,
    dtype: Dtype = "auto",
    quant: Quant = None,
    device: Device = "auto",
    force: Force = False,
    trust_remote_code: Code = False,
) -> None:
    """Talk with the base and its note; an empty line or Ctrl-D ends.

    Where the conversation outgrows the base's context its oldest turns are left out, and that is said.
    Example: postil chat --base smollm2-135m-instruct --adapter runs/support/adapter
    """
    from postil.engine import Request

    opening: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    turns: list[Mapping[str, Any]] = []
    with _engine(base, adapter, registry, dtype, quant, device, force, trust_remote_code) as engine:
        name = _only(engine)
        while True:
            try:
                text = console.err.input("[bold]you[/bold]  ").strip()
            except EOFError:
                break
            if not text:
                break
            asked = Request(messages=(*opening, *turns, {"role": "user", "content": text}), adapter=name,
                            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)  # fmt: skip
            fitting = _fitting(engine, asked, len(opening))
            if fitting is None:
                console.warn(
                    f"this message and {max_new_tokens} new tokens do not fit the base's context of "
                    f"{engine.model.base.context} tokens; it was left out: write less, or lower --max-new-tokens"
                )
                continue
            try:
                answer = _print_stream(engine, fitting)
            except AnswerError as problem:
                console.warn(f"{problem}; this turn is left out of the conversation")
                continue
            kept = list(fitting.messages or ())[len(opening) :]
            turns = [*kept, {"role": "assistant", "content": answer}]
            seed += 1


def _fitting(engine: Engine, asked: Request, opening: int) -> Request | None:
    """The conversation without its oldest turns, as many as its context forbids; None where the last is too long."""
    from postil.engine.request import prompt_ids

    messages, base = list(asked.messages or ()), engine.model.base
    left_out = 0
    while len(prompt_ids(asked, 1, base.tokenizer)) + asked.max_new_tokens > (base.context or math.inf):
        if len(messages) - opening < 3:
            return None
        del messages[opening : opening + 2]  # a question and its answer
        left_out += 1
        asked = replace(asked, messages=tuple(messages))
    if left_out:
        console.warn(
            f"the conversation outgrew the base's context of {base.context} tokens; "
            f"its oldest {'turn was' if left_out == 1 else f'{left_out} turns were'} left out"
        )
    return asked


def _engine(
    base: str,
    adapters: list[str] | None,
    registry: str | None,
    dtype: str,
    quant: str | None,
    device: str,
    force: bool,
    trust_remote_code: bool,
) -> Engine:
    from postil.adapter import attach
    from postil.adapter.peft_files import load_adapter
    from postil.base import load_base
    from postil.engine import Engine

    places: dict[str, Path] = {}
    for given in adapters or []:
        name, place = _named(given, registry)
        if name in places:
            raise RequestError(
                f"{places[name]} and {place} would both be called {name!r}; name one, for example -a second={place}"
            )
        places[name] = place
    named = {name: load_adapter(place) for name, place in places.items()}
    opened = load_base(base, dtype=dtype, device=device, trust_remote_code=trust_remote_code, quant=quant)
    model = attach(opened)
    for name, loaded in named.items():
        attach(model, loaded, name=name, force=force)
        for line in model.notes:
            console.warn(f"{name}: {line}")
    model.active = {}  # each request says what it wants
    return Engine(model)


def _named(given: str, registry: str | None) -> tuple[str, Path]:
    """The name and directory of `name=directory`, or of a directory alone, which may have a "=" in its path.

    `runs/support/adapter` alone is called support; any other directory by its own name. Where no directory is
    meant, it may be a published name, whose bytes are verified.
    """
    from postil.registry import resolve_adapter

    name, mark, path = given.partition("=")
    if name and mark and os.sep not in name and not Path(given).is_dir():
        published = resolve_adapter(path, registry)
        return name, published[1] if published else Path(path)
    published = resolve_adapter(given, registry)
    if published is not None:
        return published
    whole = Path(given).resolve()
    return whole.parent.name if whole.name == "adapter" else whole.name, Path(given)


def _only(engine: Engine) -> str | None:
    """The adapter of a single prompt: the one given, or none."""
    names = engine.adapters
    if len(names) > 1:
        raise RequestError("several adapters were given for one prompt; give one, or name them in --requests")
    return names[0] if names else None


def _print_stream(engine: Engine, request: Request) -> str:
    pieces = []
    try:
        for piece in engine.stream(request):
            typer.echo(piece, nl=False)
            pieces.append(piece)
    finally:
        typer.echo("")
    return "".join(pieces)
