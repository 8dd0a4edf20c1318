"""What is judged: an adapter on its base, or a whole fine-tuned model beside the base that it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from postil.adapter import AdaptedModel, Adapter, attach, detach
from postil.adapter.identity import adapter_sha256, update_card
from postil.adapter.peft_files import CONFIG, OWN, load_adapter
from postil.base import Base, load_base
from postil.data import DataOptions
from postil.errors import DataError, JudgeError
from postil.files import write_json
from postil.judging.card.file import KEY
from postil.judging.card.model import ScoreCard

NAME = "judged"  # of the adapter while it is resident
Judged = Adapter | Base | str | Path


@dataclass(slots=True)
class Subject:
    """base: the base, with the adapter resident where it is one. model: the same, or the whole model judged beside
    it. name: the resident's name, None for a whole model. directory: where it was read from."""

    base: AdaptedModel
    model: AdaptedModel
    name: str | None
    sha256: str
    adapter: Adapter | None = None
    directory: Path | None = None
    card: dict[str, Any] = field(default_factory=dict)  # what its files tell of the training
    notes: list[str] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, float]:
        """The adapters in force in `model` when it answers for what is judged."""
        return {} if self.name is None else {self.name: 1.0}

    @property
    def digest(self) -> str:
        """What answers for what is judged: its bytes and, of a whole model, the form that it is held in."""
        if self.name is not None:
            return self.sha256
        return f"{self.sha256} {self.model.base.fingerprint().form} {self.model.base.dtype}"

    @property
    def other(self) -> AdaptedModel | None:
        """The base where it is another model than the one judged."""
        return None if self.name is not None else self.base

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe that it was trained by; empty where that is not known."""
        found = self.card.get("recipe")
        return found if isinstance(found, dict) else {}

    def rows(self) -> DataOptions:
        """How the recipe read its rows; the defaults where there is no recipe. Raises JudgeError for an odd one."""
        try:
            options: DataOptions = DataOptions.parse(self.recipe.get("rows") or {})
        except DataError as problem:
            raise JudgeError(
                f"the recipe in {OWN}: {problem}; give the rows' format with --set rows.format"
            ) from None
        return options


@contextmanager
def opened(base: Base | PreTrainedModel | AdaptedModel, judged: Judged, *, force: bool = False) -> Iterator[Subject]:
    """Base and what is judged, ready to run; afterwards the base is as before.

    judged: an adapter directory, an Adapter, the name of a resident of an AdaptedModel, a model directory, or a Base.
    force: take an adapter made for another base. Raises AdapterError, BaseModelError, JudgeError.
    """
    keeps = isinstance(base, AdaptedModel)
    source = _source(judged, base)
    model = base if isinstance(base, AdaptedModel) else attach(base)
    before = dict(model.active)
    try:
        if model.base.tokenizer is None:
            raise JudgeError("the base has no tokenizer, so no text can be judged on it; open it with load_base")
        if isinstance(source, Base):
            with _beside(model, source) as subject:
                yield subject
        else:
            with _resident(model, source, force) as subject:
                yield subject
    finally:
        if keeps:
            model.active = before
        else:
            detach(model)


def _source(judged: Judged, base: Base | PreTrainedModel | AdaptedModel) -> Adapter | Base | str | Path:
    """What the user means: a resident's name stays a string, a directory becomes a Path or an opened Base."""
    if isinstance(judged, Adapter | Base):
        return judged
    if isinstance(judged, str) and isinstance(base, AdaptedModel) and judged in base.residents:
        return judged
    path = Path(judged)
    if is_model_directory(path):
        inner = base.base if isinstance(base, AdaptedModel) else base
        quant = "nf4" if isinstance(inner, Base) and inner.quantised else None  # the same form on both sides
        return load_base(path, dtype=str(inner.dtype).removeprefix("torch."), device=str(inner.device), quant=quant)
    return path


def is_model_directory(path: Path) -> bool:
    """Whether a directory holds a whole model and no adapter."""
    return (path / "config.json").is_file() and not (path / CONFIG).is_file()


@contextmanager
def _resident(model: AdaptedModel, source: Adapter | str | Path, force: bool) -> Iterator[Subject]:
    if isinstance(source, str):
        adapter = model.export(source)
        note = f"{source!r} was judged as it is resident: its files get no card"
        yield Subject(model, model, source, adapter_sha256(adapter), adapter, None, dict(adapter.card), [note])
        return
    directory = source if isinstance(source, Path) else None
    adapter = load_adapter(source) if isinstance(source, Path) else source
    name = next(name for n in range(len(model.residents) + 1) if (name := f"{NAME}{n or ''}") not in model.residents)
    attach(model, adapter, name=name, force=force)
    notes = list(model.notes)
    model.active = {}
    try:
        sha256 = adapter_sha256(directory or adapter)
        yield Subject(model, model, name, sha256, adapter, directory, dict(adapter.card), notes)
    finally:
        model.remove(name)


@contextmanager
def _beside(model: AdaptedModel, other: Base) -> Iterator[Subject]:
    mine, theirs = model.base.tokenizer, other.tokenizer
    if theirs is None or mine.get_vocab() != theirs.get_vocab():
        raise JudgeError(
            f"{other.source} has another tokenizer than the base, so their likelihoods cannot be compared"
        )
    second = attach(other)
    try:
        directory = other.directory
        yield Subject(model, second, None, other.fingerprint().source.removeprefix("sha256:"), None, directory,
                      _own(directory / OWN) if directory is not None else {})  # fmt: skip
    finally:
        detach(second)


def _own(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as problem:
        raise JudgeError(f"{file} cannot be read ({problem}); remove it, or save the model anew") from None
    return value if isinstance(value, dict) else {}


def keep_card(subject: Subject, card: ScoreCard) -> None:
    """Put the card where it belongs: into an Adapter's `card`, and into the postil.json of a directory.

    The weights are not touched. Raises StorageError.
    """
    if subject.adapter is not None:
        subject.adapter.card[KEY] = card.model_dump(mode="json")
    if subject.directory is None:
        return
    if subject.name is not None:
        update_card(subject.directory, **{KEY: card.model_dump(mode="json")})
        return
    file = subject.directory / OWN
    own = _own(file)
    kept = own.get("card") if isinstance(own.get("card"), dict) else {}
    write_json(file, own | {"card": {**(kept or {}), KEY: card.model_dump(mode="json")}})
