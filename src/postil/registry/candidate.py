"""What is to be published: an adapter's files by their digests, its base, and the card made for its bytes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from postil.errors import GateError, Refused
from postil.judging.card.file import KEY, read_card
from postil.judging.card.model import ScoreCard
from postil.judging.gate.gate import GateResult, unjudged
from postil.registry.version import KEPT, Manifest, Record, digests_of

if TYPE_CHECKING:
    from postil.adapter import Adapter


@dataclass(frozen=True, slots=True)
class Candidate:
    """An adapter directory that loads, with a card of its own bytes and base."""

    directory: Path
    manifest: Manifest
    card: ScoreCard

    @property
    def digest(self) -> str:
        """The version that it would be."""
        return self.manifest.digest

    @property
    def record(self) -> Record:
        """What a catalog keeps of it."""
        return Record(manifest=self.manifest, card=self.card.model_dump(mode="json"))


@contextmanager
def candidate(adapter: Adapter | str | Path, card: ScoreCard | None) -> Iterator[Candidate]:
    """Read an adapter, in memory or in its directory. Raises Refused where it has no card, or one of other bytes or
    of another base, and AdapterError where it does not load."""
    with _directory(adapter, card) as directory:
        files = digests_of(directory)  # before they are read: what changes from here on is noticed
        judged, base = _judged(directory, adapter, files)
        yield Candidate(directory, Manifest(base=base, files=files), judged)


def refusal(result: GateResult) -> GateError:
    """The error that a refused result is raised as."""
    error = Refused(result.sentence)
    error.result = result
    return error


def _judged(
    directory: Path, adapter: Adapter | str | Path, files: dict[str, str]
) -> tuple[ScoreCard, dict[str, str]]:
    from postil.adapter.identity import combined_sha256
    from postil.adapter.peft_files import load_adapter

    shown = adapter if isinstance(adapter, str | Path) else "this adapter"
    where = adapter if isinstance(adapter, str | Path) else "ADAPTER"
    loaded = load_adapter(directory)
    base = loaded.base_name or "BASE"
    mend = f"judge it first: postil judge {where} --base {base} --target FILE"
    card = read_card(directory)
    if card is None:
        raise refusal(unjudged(f"{shown} holds no score card, and what was not judged is not let through; {mend}"))
    if card.adapter_sha256 != combined_sha256(files):
        raise refusal(unjudged(f"the score card of {shown} was made for other bytes than its files hold; {mend}"))
    if loaded.base and loaded.base.get("source") != card.base.get("source"):
        raise refusal(
            unjudged(f"{shown} belongs to the base {loaded.base.get('source')} and was judged on another; {mend}")
        )
    return card, loaded.base or card.base


@contextmanager
def _directory(adapter: Adapter | str | Path, card: ScoreCard | None) -> Iterator[Path]:
    """The adapter's directory, as it is or, in memory or with a card to add, a copy that is gone afterwards."""
    if isinstance(adapter, str | Path) and card is None:
        yield Path(adapter)
        return
    from postil.adapter.identity import update_card
    from postil.adapter.peft_files import read_config, save_adapter

    with tempfile.TemporaryDirectory(prefix="postil-publish-") as place:
        copy = Path(place) / "adapter"
        if isinstance(adapter, str | Path):
            read_config(Path(adapter))
            copy.mkdir()
            for name in KEPT:
                if (Path(adapter) / name).is_file():
                    shutil.copyfile(Path(adapter) / name, copy / name)
        else:
            save_adapter(adapter, copy)
        if card is not None:
            update_card(copy, **{KEY: card.model_dump(mode="json")})
        yield copy
