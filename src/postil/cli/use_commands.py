"""postil generate and chat: answers with and without notes, one by one or a whole file in one batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from postil import console
from postil.errors import RequestError

if TYPE_CHECKING:
    from postil.engine import Engine, Request

BaseName = Annotated[str, typer.Option("--base", "-b", help="Model directory, known base, hub name, GGUF.")]
Adapters = Annotated[
    list[str] | None, typer.Option("--adapter", "-a", help="An adapter directory, or name=directory; repeatable.")
]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
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
    requests: Annotated[Path | None, typer.Option(help="A JSONL of requests, each naming its adapter.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the plain text; no chat template.")] = False,
    max_new_tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    seed: Annotated[int, typer.Option(help="Decides sampled answers.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Answer a prompt, or every line of a file in one batch.

    A line of --requests: {"prompt": "…", "adapter": "support"} (no adapter: the bare base).
    Example: postil generate "Where is my order?" --base smollm2-135m-instruct --adapter runs/support/adapter
    """
    from postil.cli.requests_file import read_requests
    from postil.engine import Request

    if (prompt is None) == (requests is None):
        raise RequestError('give a prompt or --requests FILE, for example: postil generate "Hello" --base B')
    defaults = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "raw": raw}
    asked = read_requests(requests, defaults) if requests is not None else []
    with _engine(base, adapter, dtype, device, force) as engine:
        if requests is not None:
            for answer in engine.run(asked):
                fields = {"text": answer.text, "adapter": answer.adapter, "finish_reason": answer.finish_reason,
                          "prompt_tokens": answer.prompt_tokens, "new_tokens": len(answer.ids)}  # fmt: skip
                typer.echo(json.dumps(fields, ensure_ascii=False))
            return
        one = Request(prompt=prompt, adapter=_only(engine), raw=raw, max_new_tokens=max_new_tokens,
                      temperature=temperature, seed=seed)  # fmt: skip
        _print_stream(engine, one)


def chat(
    base: BaseName,
    adapter: Adapters = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Tokens = 256,
    temperature: Temperature = 0.0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Talk with the base and its note; an empty line or Ctrl-D ends.

    Example: postil chat --base smollm2-135m-instruct --adapter runs/support/adapter
    """
    from postil.engine import Request

    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    with _engine(base, adapter, dtype, device, force) as engine:
        while True:
            try:
                text = console.err.input("[bold]you[/bold]  ").strip()
            except EOFError:
                break
            if not text:
                break
            messages.append({"role": "user", "content": text})
            asked = Request(messages=tuple(messages), adapter=_only(engine), max_new_tokens=max_new_tokens,
                            temperature=temperature)  # fmt: skip
            messages.append({"role": "assistant", "content": _print_stream(engine, asked)})


def _engine(base: str, adapters: list[str] | None, dtype: str, device: str, force: bool) -> Engine:
    from postil.adapter.peft_files import load_adapter
    from postil.base import load_base
    from postil.engine import Engine

    named = {}
    for given in adapters or []:
        name, mark, path = given.partition("=")
        place = Path(path if mark else given)
        loaded = load_adapter(place)
        if force:
            loaded.base = {}  # whose it was is forgotten, so there is nothing to compare with
        named[name if mark else _name_of(place)] = loaded
    return Engine(load_base(base, dtype=dtype, device=device), adapters=named)


def _name_of(directory: Path) -> str:
    """`runs/support/adapter` is called support; any other directory by its own name."""
    whole = directory.resolve()
    return whole.parent.name if whole.name == "adapter" else whole.name


def _only(engine: Engine) -> str | None:
    """The adapter of a single prompt: the one given, or none."""
    names = engine.adapters
    if len(names) > 1:
        raise RequestError("several adapters were given for one prompt; give one, or name them in --requests")
    return names[0] if names else None


def _print_stream(engine: Engine, request: Request) -> str:
    pieces = []
    for piece in engine.stream(request):
        typer.echo(piece, nl=False)
        pieces.append(piece)
    typer.echo("")
    return "".join(pieces)
