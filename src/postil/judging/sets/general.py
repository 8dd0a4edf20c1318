"""General ability: prose by its nats and its KL to the base, and sets of questions, as parts of a card."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from postil.adapter import AdaptedModel
from postil.base import Base
from postil.data import Sample
from postil.data.rows import Row
from postil.data.shipped import SHIPPED
from postil.errors import DataError
from postil.judging.asking.likelihoods import Adapters, Done, Losses, nats_and_kl, row_losses, windows
from postil.judging.card.build import KL, NATS, Draw, Measured, part_of, slices_of, stats_of
from postil.judging.card.model import DataUsed, Part
from postil.judging.metrics.metric import Metric
from postil.judging.options import GeneralOptions
from postil.judging.sets.choices import CHOICES, PAIRS, OptionSet, read_choices, read_pairs
from postil.judging.sets.read import From, Rows, check_texts, column_of, read_rows, shipped_text

MEASURES: dict[str, dict[str, Metric]] = {
    "nats": {"nats": NATS},
    "kl": {"kl": KL},
    "choices": CHOICES,
    "pairs": PAIRS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class General:
    """What general ability is measured on; None for what was not asked for."""

    text: DataUsed | None = None
    windows: tuple[Sample, ...] = ()
    documents: tuple[str, ...] = ()  # what the windows are of
    kl: bool = True
    sets: dict[str, OptionSet] = field(default_factory=dict)  # "choices", "pairs"
    notes: tuple[str, ...] = ()

    @property
    def measures(self) -> dict[str, dict[str, Metric]]:
        """What will be measured, by part."""
        texts = (["nats", "kl"] if self.kl else ["nats"]) if self.windows else []
        return {part: MEASURES[part] for part in (*texts, *self.sets)}

    @property
    def work(self) -> int:
        """How many samples one measuring of an adapter runs."""
        texts = len(self.windows) * (2 if self.kl else 1)
        return texts + sum(found.work for found in self.sets.values())


@dataclass(slots=True)
class Scored:
    """What a model was found to do: statistics by part and measure, and each option's (nats, tokens)."""

    parts: dict[str, Measured] = field(default_factory=dict)
    options: dict[str, list[Losses]] = field(default_factory=dict)


def read_general(
    text: From | None, choices: From | None, pairs: From | None, base: Base, options: GeneralOptions, seed: int
) -> General:
    """The sets to measure on. text: rows of {"text"} ("shipped": the sample that comes with postil); choices:
    {"context", "choices", "answer"}; pairs: {"good", "bad"} or {"sentence_good", "sentence_bad"}.

    Raises DataError naming the file, the line and the column.
    """
    found, notes = None, list[str]()
    pieces, documents = list[Sample](), list[str]()
    if text is not None:
        rows = shipped_text() if isinstance(text, str) and text == SHIPPED else read_rows(text)
        texts = [_text(rows, row) for row in rows.rows]
        window = min(options.window, base.context or options.window)
        pieces = windows(base.tokenizer, texts, options.tokens, window)
        if not pieces:
            raise DataError(f"{rows.name}: its text gives no window of two tokens; give more text.")
        documents = texts[: _reached(base.tokenizer, texts, options.tokens)]
        found = _windows_used(rows.name, len(rows.rows), pieces)
    sets: dict[str, OptionSet] = {}
    if choices is not None:
        sets["choices"] = read_choices(read_rows(choices), base, options, seed, notes)
    if pairs is not None:
        sets["pairs"] = read_pairs(read_rows(pairs), base, options, seed, notes)
    return General(
        text=found, windows=tuple(pieces), documents=tuple(documents), kl=options.kl, sets=sets, notes=tuple(notes)
    )


def _reached(tokenizer: Any, texts: Sequence[str], tokens: int | None) -> int:
    """How many texts the first `tokens` tokens come from (None: all)."""
    left = tokens
    for place, text in enumerate(texts):
        if left is not None and left <= 0:
            return place
        if left is not None:
            left -= len(tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"])
    return len(texts)


def _windows_used(name: str, rows: int, pieces: Sequence[Sample]) -> DataUsed:
    """What the card says of running text: the digest is over the windows' tokens, so another cut is other data."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece.ids).to_bytes(8, "big") + piece.ids.tobytes())
    return DataUsed(
        name=name, sha256=digest.hexdigest(), rows=rows, tokens=sum(piece.target_tokens for piece in pieces)
    )


def _text(rows: Rows, row: Row) -> str:
    text = column_of(rows, row, "text")
    if not isinstance(text, str):
        raise DataError(f"{rows.where(row)}: `text` must be a string, found {type(text).__name__}.")
    check_texts(rows, row, [text])
    return text


def measure(
    general: General,
    model: AdaptedModel,
    adapter: Adapters,
    base: AdaptedModel | None = None,
    done: Done = lambda _: None,
) -> Scored:
    """Statistics of a model on the general sets. adapter: as in row_losses; base: where it is another model, the
    one that the KL is taken to."""
    out = Scored()
    if general.windows:
        if general.kl and (adapter or base is not None):
            nats, kl = nats_and_kl(model, general.windows, adapter, base, done)
        else:
            nats = row_losses(model, general.windows, adapter, done)
            kl = [(0.0, count) for _, count in nats]  # KL(base ‖ base) is 0
            done(len(general.windows) if general.kl else 0)
        out.parts["nats"] = {"nats": stats_of(nats)}
        if general.kl:
            out.parts["kl"] = {"kl": stats_of(kl)}
    for name, found in general.sets.items():
        out.options[name], out.parts[name] = found.measure(model, adapter, done)
    return out


def general_parts(
    general: General,
    base: Scored,
    adapter: Scored,
    draw: Draw,
    columns: Sequence[str],
    smallest: int,
    defined: Mapping[str, Any] | None = None,
) -> dict[str, Part]:
    """The card's general parts: windows, questions and pairs are the units of the bootstrap. defined: as part_of."""
    out = {}
    for name, found in adapter.parts.items():
        options = general.sets.get(name)
        data = options.data if options is not None else general.text
        assert data is not None
        rows: list[Mapping[str, Any]] = [row.value for row in options.rows] if options is not None else []
        slices, _ = slices_of(rows, columns, smallest)
        main = next(iter(found))
        out[name] = part_of(data, main, MEASURES[name], base.parts[name], found, draw, slices=slices,
                            defined=defined)  # fmt: skip
    return out
