"""Questions answered by likelihood: multiple choice and minimal pairs, read, and told right or wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from postil.adapter import AdaptedModel
from postil.base import Base
from postil.data import Sample
from postil.data.rows import Row
from postil.errors import DataError, listed
from postil.judging.asking.likelihoods import Adapters, Done, Losses, option_losses, option_samples
from postil.judging.card.build import ACCURACY, PER_TOKEN, Measured, hits, measured
from postil.judging.card.model import DataUsed
from postil.judging.metrics.metric import Metric
from postil.judging.options import GeneralOptions
from postil.judging.sets.read import Rows, check_texts, chosen, column_of, used

PER_CHARACTER = measured("accuracy_per_character", "higher", "%")  # lm-eval's acc_norm
PER_BYTE = measured("accuracy_per_byte", "higher", "%")  # lm-eval's acc_bytes
CHOICES: dict[str, Metric] = {one.name: one for one in (ACCURACY, PER_TOKEN, PER_CHARACTER, PER_BYTE)}
PAIRS: dict[str, Metric] = {ACCURACY.name: ACCURACY}
Options = tuple[list[tuple[str, str]], int]  # (context, continuation) of each option, and the right one's place
_BLANK = re.compile(r"(?<!\w)_(?!\w)")  # Winogrande's place for a name; a row of underscores is none
_PAIRS = (("good", "bad"), ("sentence_good", "sentence_bad"))


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionSet:
    """Questions answered by likelihood: rows as read, each option as a sample and its length in characters and in
    bytes, the place of the right one. measures: by name, the main one first."""

    data: DataUsed
    rows: tuple[Row, ...]
    samples: tuple[list[Sample], ...]
    lengths: tuple[list[tuple[int, int]], ...]
    right: tuple[int, ...]
    measures: dict[str, Metric]

    @property
    def work(self) -> int:
        """How many samples one measuring runs."""
        return sum(map(len, self.samples))

    def measure(self, model: AdaptedModel, adapter: Adapters, done: Done) -> tuple[list[Losses], Measured]:
        """Each option's (nats, tokens), and right or wrong by each measure."""
        losses = option_losses(model, self.samples, adapter, done)
        return losses, {name: hits(self._right(losses, name)) for name in self.measures}

    def _right(self, losses: Sequence[Losses], name: str) -> list[bool]:
        """Whether the right option is likelier than every other: by its sum, or by its mean over what it is long."""
        out = []
        for question, sizes, place in zip(losses, self.lengths, self.right, strict=True):
            by = {
                ACCURACY.name: [1] * len(question),
                PER_TOKEN.name: [count for _, count in question],
                PER_CHARACTER.name: [characters for characters, _ in sizes],
                PER_BYTE.name: [count for _, count in sizes],
            }[name]
            nats = [total / size for (total, _), size in zip(question, by, strict=True)]
            out.append(all(nats[place] < other for n, other in enumerate(nats) if n != place))
        return out


def read_choices(rows: Rows, base: Base, options: GeneralOptions, seed: int, notes: list[str]) -> OptionSet:
    """Rows of {"context", "choices", "answer"}; notes: for the user, added to. Raises DataError naming the line."""
    cloze = _cloze(rows, notes)
    asked = [_choices(rows, row, options.prompt, row.number in cloze) for row in rows.rows]
    whole = [n for n, row in enumerate(rows.rows) if "" not in row.value["choices"]]
    if not whole:
        raise DataError(f"{rows.name}: every question has an empty choice, so none can be scored.")
    if len(whole) < len(asked):
        numbers = listed([row.number for row in rows.rows if "" in row.value["choices"]], 5)
        left_out = len(asked) - len(whole)
        notes.append(f"{rows.name}: {left_out} questions are left out, a choice being empty (rows {numbers})")
    places = [whole[n] for n in chosen(len(whole), options.choices, seed, "choices")]
    found = _option_set(rows, [asked[n] for n in places], places, CHOICES, base, notes)
    chance = sum(1 / len(question) for question in found.samples) / len(found.samples)
    notes.append(f"choices: chance is {100 * chance:.1f}%")
    return found


def read_pairs(rows: Rows, base: Base, options: GeneralOptions, seed: int, notes: list[str]) -> OptionSet:
    """Rows of {"good", "bad"} or {"sentence_good", "sentence_bad"}, asked as lm-eval asks BLiMP: the likelihood of a
    whole sentence, its first token included, a space before it. notes: for the user, added to. Raises DataError."""
    both = [_pair(rows, row) for row in rows.rows]
    equal = [n for n, ((good, bad), _) in enumerate(both) if good == bad]
    if equal:
        numbers = listed([rows.rows[n].number for n in equal], 5)
        notes.append(f"{rows.name}: {len(equal)} pairs are left out, both sentences being equal (rows {numbers})")
    places = [n for n in _each(rows, options.pairs_each, seed) if n not in equal]
    places = [places[n] for n in chosen(len(places), options.pairs, seed, "pairs")]
    notes.append("pairs: chance is 50%")
    return _option_set(rows, [both[n] for n in places], places, PAIRS, base, notes)


def _option_set(
    rows: Rows,
    asked: Sequence[Options],
    places: Sequence[int],
    measures: dict[str, Metric],
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
    texts = [[text.removeprefix(" ") for _, text in asked[n][0]] for n in kept]  # less lm-eval's delimiter
    return OptionSet(
        data=used(rows.name, chosen_rows, tokens),
        rows=chosen_rows,
        samples=tuple(samples),
        lengths=tuple([(len(text), len(text.encode())) for text in one] for one in texts),
        right=tuple(asked[n][1] for n in kept),
        measures=measures,
    )


def _choices(rows: Rows, row: Row, prompt: str, cloze: bool) -> Options:
    """(context, continuation) of each choice, and the right one's place."""
    context, choices, answer = (column_of(rows, row, name) for name in ("context", "choices", "answer"))
    if not isinstance(context, str):
        raise DataError(f"{rows.where(row)}: `context` must be a string, found {type(context).__name__}.")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) for one in choices):
        raise DataError(f"{rows.where(row)}: `choices` must be a list of two strings or more.")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DataError(
            f"{rows.where(row)}: `answer` must be the right place, 0 to {len(choices) - 1}, found {answer!r}."
        )
    check_texts(rows, row, [context, *choices])
    if cloze:
        return [_filled(context, choice) for choice in choices], answer
    return [(prompt.replace("{context}", context), f" {choice}") for choice in choices], answer


def _cloze(rows: Rows, notes: list[str]) -> set[int]:
    """The numbers of the rows whose choices fill a blank in the context: those whose column `cloze` says so; where no
    row has that column all, if each context of the file holds one lone `_` (Winogrande)."""
    blanks = [row for row in rows.rows if len(_BLANK.findall(str(row.value.get("context")))) == 1]
    told = [row for row in rows.rows if "cloze" in row.value]
    for row in told:
        if not isinstance(row.value["cloze"], bool):
            raise DataError(f"{rows.where(row)}: `cloze` must be true or false, found {row.value['cloze']!r}.")
        if row.value["cloze"] and row not in blanks:
            raise DataError(f"{rows.where(row)}: `cloze` is true, and the context does not hold one `_` to fill.")
    found = [row for row in told if row.value["cloze"]] if told else blanks if len(blanks) == len(rows.rows) else []
    if found:
        notes.append(
            f"choices: in {len(found):,} questions each choice fills the blank `_` of the context, and what follows "
            "is scored (cloze)"
        )
    if (left := len([row for row in blanks if row not in found and "cloze" not in row.value])) > 0:
        notes.append(
            f"choices: {left:,} contexts hold one lone `_` and are asked as they stand; a row with a blank to fill "
            'says so in a column: "cloze": true'
        )
    return {row.number for row in found}


def _filled(context: str, choice: str) -> tuple[str, str]:
    """The choice is context and the rest of the sentence is scored (Trinh & Le 2018, section 3.1, partial scoring);
    a choice that ends the sentence is scored itself."""
    before, after = _BLANK.split(context)
    if re.search(r"\w", after):
        return before + choice, after
    return before.rstrip(), f" {choice}{after}"


def _pair(rows: Rows, row: Row) -> Options:
    names = next((names for names in _PAIRS if names[0] in row.value or names[1] in row.value), _PAIRS[0])
    both = [column_of(rows, row, name) for name in names]
    if not all(isinstance(one, str) and one for one in both):
        raise DataError(f"{rows.where(row)}: `{names[0]}` and `{names[1]}` must be two sentences, as strings.")
    check_texts(rows, row, both)
    return [("", f" {one}") for one in both], 0


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
