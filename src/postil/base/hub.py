"""Fetches a model directory from the hub with transformers' own downloader; never code, never pickles."""

from __future__ import annotations

import re
from pathlib import Path

from postil.base.quiet import quiet
from postil.errors import BaseModelError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "README.md"]
# Copies of the weights in other layouts: a model directory is flat.
_UNWANTED = ["*/*", "consolidated*"]


def is_hub_name(source: str) -> bool:
    """Whether `source` reads as owner/name."""
    return _NAME.fullmatch(source) is not None and not source.endswith(".gguf")


def download(name: str, *, code: bool = False) -> Path:
    """The local snapshot of the hub's `owner/name`: config, tokenizer and safetensors (`code`: *.py too).

    What was fetched before is used without the network. Raises BaseModelError when it cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    # The error of the HTTP library beneath, whichever this version of the hub's client uses.
    beneath: tuple[type[BaseException], ...] = HfHubHTTPError.__bases__
    network: tuple[type[BaseException], ...] = (
        *beneath,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        OSError,
    )
    patterns = [*_WANTED, "*.py"] if code else _WANTED
    try:
        with quiet():
            return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=_UNWANTED))
    except GatedRepoError as error:
        raise BaseModelError(
            f"{name} is gated on the hub: accept its terms there and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise BaseModelError(
            f"{name} is neither a directory here nor a model on the hub that you may read: check the name."
        ) from error
    except HFValidationError as error:
        raise BaseModelError(f"{name!r} is no name of a model on the hub: it reads owner/name.") from error
    except network as error:
        raise BaseModelError(
            f"{name} is not a directory here, and the hub cannot be reached to fetch it: "
            "check the network, or give a model directory."
        ) from error


def cached(name: str, revision: str | None) -> Path | None:
    """The snapshot of `owner/name` that lies here already, whole enough to read its config, or None."""
    from huggingface_hub import try_to_load_from_cache

    if not is_hub_name(name):
        return None
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None
