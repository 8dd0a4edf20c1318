"""The general part: nats per token of running text, token KL to the base, multiple choice and minimal pairs."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from postil.adapter import AdaptedModel
from postil.base import Base
from postil.data import Sample
from postil.data.rows import Row
from postil.errors import DataError, listed, nearest
from postil.judging.asking.likelihoods import (
    Adapters,
    Done,
    Losses,
    nats_and_kl,
    option_losses,
    option_samples,
    row_losses,
    windows,
)
from postil.judging.card.build import (
    ACCURACY,
    KL,
    NATS,
    PER_TOKEN,
    Draw,
    Measured,
    hits,
    part_of,
    slices_of,
    stats_of,
)
from postil.judging.card.model import DataUsed, Part
from postil.judging.metrics.metric import Metric
from postil.judging.options import GeneralOptions
from postil.judging.sets.read import SHIPPED, From, Rows, chosen, read_rows, shipped_text, used

MEASURES: dict[str, dict[str, Metric]] = {
    "nats": {"nats": NATS},
    "kl": {"kl": KL},
    "choices": {"accuracy": ACCURACY, "accuracy_per_token": PER_TOKEN},
    "pairs": {"accuracy": ACCURACY},
}
Question = tuple[list[tuple[str, str]], int]  # (context, continuation) of each option, and the right one's place
_BLANK = re.compile(r"(?<!\w)_(?!\w)")  # Winogrande's place for a name; a row of underscores is none
_PAIRS = (("good", "bad"), ("sentence_good", "sentence_bad"))


@dataclass(frozen=True, slots=True)
class OptionSet:
    """Questions answered by likelihood: rows as read, each option as a sample, the place of the right one."""

    data: DataUsed
    rows: tuple[Row, ...]
    samples: tuple[list[Sample], ...]
    right: tuple[int, ...]


@dataclass(frozen=True, slots=True)
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
        return texts + sum(len(question) for found in self.sets.values() for question in found.samples)


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
    sets = {}
    if choices is not None:
        sets["choices"] = _read_choices(read_rows(choices), base, options, seed, notes)
    if pairs is not None:
        sets["pairs"] = _read_pairs(read_rows(pairs), base, options, seed, notes)
    return General(found, tuple(pieces), tuple(documents), options.kl, sets, tuple(notes))


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


def _read_choices(rows: Rows, base: Base, options: GeneralOptions, seed: int, notes: list[str]) -> OptionSet:
    asked = [_choices(rows, row, options.prompt) for row in rows.rows]
    whole = [n for n, row in enumerate(rows.rows) if "" not in row.value["choices"]]
    if not whole:
        raise DataError(f"{rows.name}: every question has an empty choice, so none can be scored.")
    if len(whole) < len(asked):
        numbers = listed([row.number for row in rows.rows if "" in row.value["choices"]], 5)
        left_out = len(asked) - len(whole)
        notes.append(f"{rows.name}: {left_out} questions are left out, a choice being empty (rows {numbers})")
    places = [whole[n] for n in chosen(len(whole), options.choices, seed, "choices")]
    found = _option_set(rows, [asked[n] for n in places], places, base, notes)
    chance = sum(1 / len(question) for question in found.samples) / len(found.samples)
    notes.append(f"choices: chance is {100 * chance:.1f}%")
    return found


def _read_pairs(rows: Rows, base: Base, options: GeneralOptions, seed: int, notes: list[str]) -> OptionSet:
    both = [_pair(rows, row) for row in rows.rows]
    equal = [n for n, ((good, bad), _) in enumerate(both) if good == bad]
    if equal:
        numbers = listed([rows.rows[n].number for n in equal], 5)
        notes.append(f"{rows.name}: {len(equal)} pairs are left out, both sentences being equal (rows {numbers})")
    places = [n for n in _each(rows, options.pairs_each, seed) if n not in equal]
    places = [places[n] for n in chosen(len(places), options.pairs, seed, "pairs")]
    notes.append("pairs: chance is 50%")
    return _option_set(rows, [both[n] for n in places], places, base, notes)


def _option_set(
    rows: Rows,
    asked: Sequence[tuple[list[tuple[str, str]], int]],
    places: Sequence[int],
    base: Base,
    notes: list[str],
) -> OptionSet:
    samples, left_out = option_samples([options for options, _ in asked], base.tokenizer, base.context)
    if not samples:
        raise DataError(f"{rows.name}: no question fits the base's context of {base.context} tokens.")
    if left_out:
        numbers = listed([rows.rows[places[n]].number for n in left_out], 5)
        notes.append(f"{rows.name}: {len(left_out)} questions are left out, too long or too short (rows {numbers})")
    kept = [n for n in range(len(asked)) if n not in set(left_out)]
    chosen_rows = tuple(rows.rows[places[n]] for n in kept)
    tokens = sum(sample.target_tokens for question in samples for sample in question)
    return OptionSet(
        used(rows.name, chosen_rows, tokens), chosen_rows, tuple(samples), tuple(asked[n][1] for n in kept)
    )


def _text(rows: Rows, row: Row) -> str:
    text = _column(rows, row, "text")
    if not isinstance(text, str):
        raise DataError(f"{rows.where(row)}: `text` must be a string, found {type(text).__name__}.")
    return text


def _column(rows: Rows, row: Row, name: str) -> Any:
    if name not in row.value:
        near = nearest(name, row.value) or f"; the row has {listed(map(repr, row.value))}"
        raise DataError(f"{rows.where(row)}: no column {name!r}{near}.")
    return row.value[name]


def _choices(rows: Rows, row: Row, prompt: str) -> Question:
    """(context, continuation) of each choice, and the right one's place."""
    context, choices, answer = (_column(rows, row, name) for name in ("context", "choices", "answer"))
    if not isinstance(context, str):
        raise DataError(f"{rows.where(row)}: `context` must be a string, found {type(context).__name__}.")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) for one in choices):
        raise DataError(f"{rows.where(row)}: `choices` must be a list of two strings or more.")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(
            f"{rows.where(row)}: `answer` must be the right place, 0 to {len(choices) - 1}, found {answer!r}."
        )
    return [_continued(context, choice, prompt) for choice in choices], answer


def _continued(context: str, choice: str, prompt: str) -> tuple[str, str]:
    """What leads to a choice and what is scored. Where a blank is to be filled, the choice is context and the rest
    of the sentence is scored (Trinh & Le 2018, section 3.1, partial scoring)."""
    blanks = _BLANK.findall(context)
    if len(blanks) != 1:
        return prompt.replace("{context}", context), f" {choice}"
    before, after = _BLANK.split(context)
    if re.search(r"\w", after):
        return before + choice, after
    return before.rstrip(), f" {choice}{after}"


def _pair(rows: Rows, row: Row) -> Question:
    names = next((names for names in _PAIRS if names[0] in row.value or names[1] in row.value), _PAIRS[0])
    both = [_column(rows, row, name) for name in names]
    if not all(isinstance(one, str) and one for one in both):
        raise DataError(f"{rows.where(row)}: `{names[0]}` and `{names[1]}` must be two sentences, as strings.")
    return [("", str(one)) for one in both], 0


def _each(rows: Rows, most: int | None, seed: int) -> list[int]:
    """The places of at most so many rows of every paradigm."""
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows.rows):
        groups.setdefault(str(row.value.get("paradigm")), []).append(place)
    if most is not None and list(groups) == ["None"]:
        raise DataError(f"{rows.name}: its rows have no column 'paradigm', which pairs_each counts by; leave it out.")
    return sorted(
        places[n] for name, places in groups.items() for n in chosen(len(places), most, seed, "pairs", name)
    )


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
        losses = option_losses(model, found.samples, adapter, done)
        out.options[name] = losses
        out.parts[name] = {"accuracy": hits(_right(losses, found.right, per_token=False))}
        if name == "choices":
            out.parts[name]["accuracy_per_token"] = hits(_right(losses, found.right, per_token=True))
    return out


def _right(losses: Sequence[Losses], right: Sequence[int], *, per_token: bool) -> list[bool]:
    """Whether the right option is likelier than every other, by its sum or by its mean over tokens."""
    out = []
    for question, place in zip(losses, right, strict=True):
        nats = [total / count if per_token else total for total, count in question]
        out.append(all(nats[place] < other for n, other in enumerate(nats) if n != place))
    return out


def general_parts(
    general: General, base: Scored, adapter: Scored, draw: Draw, columns: Sequence[str], smallest: int
) -> dict[str, Part]:
    """The card's general parts: windows, questions and pairs are the units of the bootstrap."""
    out = {}
    for name, found in adapter.parts.items():
        options = general.sets.get(name)
        data = options.data if options is not None else general.text
        assert data is not None
        rows: list[Mapping[str, Any]] = [row.value for row in options.rows] if options is not None else []
        slices, _ = slices_of(rows, columns, smallest)
        main = next(iter(found))
        out[name] = part_of(data, main, MEASURES[name], base.parts[name], found, draw, slices=slices)
    return out
