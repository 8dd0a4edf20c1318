"""A JSONL of requests for `postil generate --requests`: each line checked, its fault named by line and key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, Field

from postil.data.rows import once
from postil.engine import Request
from postil.errors import PostilError, RequestError
from postil.settings import Settings


class Line(Settings):
    """The keys of one line; what is left out is as in the command's options."""

    model_config = ConfigDict(strict=True)
    error: ClassVar[type[PostilError]] = RequestError
    where: ClassVar[str] = "request"

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    adapter: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop: list[str] = Field(default_factory=list)
    raw: bool = False


def read_requests(path: Path, defaults: dict[str, Any]) -> list[Request]:
    """The requests of a file, in order; `defaults` stand in for keys that a line leaves out.

    Raises RequestError that names the file, the line and the key.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is not UTF-8 text (byte {error.start + 1}); save it as UTF-8") from None
    requests = [_request(f"{path}:{number}", line, defaults) for number, line in enumerate(lines, 1) if line.strip()]
    if not requests:
        raise RequestError(f'{path} holds no request; write one a line, such as {{"prompt": "Hello"}}')
    return requests


def _request(where: str, line: str, defaults: dict[str, Any]) -> Request:
    try:
        value = json.loads(line, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise RequestError(f'{where}: a request is an object such as {{"prompt": "Hello"}}')
    try:
        fields = Line.parse(defaults | value).model_dump()
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None
    fields["stop"] = tuple(fields["stop"])
    return Request(**fields, label=where)
