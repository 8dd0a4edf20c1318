"""The options that a row itself offers its answer from: in a column, as marked lines, as a list in the prompt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("choices", "options", "labels")
MOST_OPTIONS = 1000
_PER_LABEL = 3  # rows a label has on average, at least, for answers to be labels
_LABEL_LENGTH = 60  # characters
_LISTED = 0.9  # of the rows whose prompts must list their answer among others
_MARKED = re.compile(r"^\s*[(\[]?([A-Za-z]|\d{1,2})[.):\]]\s*(\S.*)$")
_SEPARATORS = (  # of the items of a list; of an answer that holds one of the words itself, a plainer one
    re.compile(r"\s*[,;|]\s*(?:(?:or|and)\s+)?"),
    re.compile(r"\s*[,;|/]\s*(?:or\s+)?|\s+or\s+"),
    re.compile(r"\s*[,;|/]\s*(?:(?:or|and)\s+)?|\s+(?:or|and)\s+"),
)
_ENDS = re.compile(r"(?:[.?!](?=\s|$)|[:\n])")  # what parts one list from what stands before and after it
_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=\S)")
_QUOTES = " \t\"'`“”‘’«»()[]{}*"

Asked = tuple[Mapping[str, Any], str]  # a row with its references, and its prompt
Options = list[tuple[str, ...]]


def own_options(rows: Sequence[Asked], known: Sequence[str]) -> Options | None:
    """The options of each row, from the first of these that tells them for the rows: a column of the row, marked
    lines of its prompt ("B. copper"), a list in its prompt ("copper, tin or zinc"), the labels that `known` answers
    are. None where nothing does.

    Options are some only where one of the row's references is among them and another is no reference.
    """
    columns, marked = [_in_column(row) for row in rows], [_in_marked_lines(row) for row in rows]
    listed = _without_what_leads([_in_a_list(row) for row in rows], [*known, *_references(rows)])
    for found, share in ((columns, 1.0), (marked, _LISTED), (listed, _LISTED)):
        if sum(map(bool, found)) >= share * len(rows):
            return [options or ("",) for options in found]  # a row that lists none is answered by nothing
    labels = tuple(dict.fromkeys(text.strip() for text in known))
    few = 2 <= len(labels) <= MOST_OPTIONS and len(labels) * _PER_LABEL <= len(known)
    if few and all(len(label) <= _LABEL_LENGTH and "\n" not in label for label in labels):
        return [labels] * len(rows)
    return None


def _in_column(row: Asked) -> tuple[str, ...]:
    value, _ = row
    for column in COLUMNS:
        given = value.get(column)
        if isinstance(given, Mapping):  # {"text": [...], "label": [...]}, as ARC has them
            lists = [one for one in given.values() if isinstance(one, Sequence) and not isinstance(one, str)]
        else:
            lists = [given] if isinstance(given, Sequence) and not isinstance(given, str) else []
        for texts in lists:
            words = [str(one) for one in texts if isinstance(one, str | int | float)]
            if len(words) < len(texts):
                continue
            places = range(len(words))
            marks = [[chr(ord("A") + n) for n in places[:26]], [str(n) for n in places], [str(n + 1) for n in places]]
            for options in (words, *marks):
                if kept := _of_the_answer(options, value):
                    return kept
    return ()


def _in_marked_lines(row: Asked) -> tuple[str, ...]:
    """The marks, or the texts after them, or both, of the lines that begin with a mark."""
    value, prompt = row
    found = [(line.strip(), match) for line in prompt.splitlines() if (match := _MARKED.match(line))]
    forms = (
        [match[1] for _, match in found],
        [match[2].strip() for _, match in found],
        [line for line, _ in found],
    )
    return next((kept for options in forms if (kept := _of_the_answer(options, value))), ())


def _in_a_list(row: Asked) -> tuple[str, ...]:
    """The items of the longest list in words that holds the answer as one of them."""
    value, prompt = row
    best: tuple[str, ...] = ()
    for run in _ENDS.split(prompt):
        for between in _SEPARATORS:
            items = [item for one in between.split(run) if (item := one.strip(_QUOTES))]
            if len(items) > max(len(best), 1):
                ends = [_led_to(items[0], value), *items[1:-1], _led_from(items[-1], value)]
                kept = _of_the_answer(ends, value)
                best = kept if len(kept) > len(best) else best
    return best


def _without_what_leads(lists: Sequence[tuple[str, ...]], known: Sequence[str]) -> list[tuple[str, ...]]:
    """The lists without the first item where it begins half of them and is nobody's answer: "Which is larger" of
    "Which is larger, a cat or a dog?"; whole where less than two items would be left."""
    answers = {_plain(text) for text in known}
    count = Counter(_plain(options[0]) for options in lists if options)
    leads = {plain for plain, times in count.items() if 2 * times >= max(len(lists), 4) and plain not in answers}
    return [options[1:] if len(options) > 2 and _plain(options[0]) in leads else options for options in lists]


def _references(rows: Sequence[Asked]) -> list[str]:
    return [text for value, _ in rows for text in value["references"]]


def _led_to(item: str, value: Mapping[str, Any]) -> str:
    """A list's first item without what leads to it, where the answer ends it: "Answer yes"."""
    plain = _plain(item)
    return next((text for text in value["references"] if plain.endswith(f" {_plain(text)}")), item)


def _led_from(item: str, value: Mapping[str, Any]) -> str:
    """A list's last item without what follows it, where the answer begins it: "no to the question"."""
    plain = _plain(item)
    return next((text for text in value["references"] if plain.startswith(f"{_plain(text)} ")), item)


def _of_the_answer(options: Sequence[str], value: Mapping[str, Any]) -> tuple[str, ...]:
    """The options, each once, where one of the row's references is among them and another is none of them."""
    references = {_plain(text) for text in value["references"]}
    kept = {_plain(option): option for option in reversed(options)}
    if len(kept) < 2:
        return ()
    if not references & kept.keys():
        return ()
    if not kept.keys() - references:
        return ()
    exact = {_plain(text): text.strip() for text in value["references"]}
    return tuple(exact.get(plain, option) for plain, option in reversed(kept.items()))


def _plain(text: str) -> str:
    """A text as options are compared: without quotes, final stop, English article and capitals."""
    return _ARTICLE.sub("", text.strip(_QUOTES).rstrip(".").casefold())
