"""Digests of rows, 8 bytes each: what a row asks, what it asks and answers, and passages of running text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from postil.data.formats import Chat, Pair, Text
from postil.data.messages import Message, calls_of
from postil.errors import DataError

MOST = 200_000  # digests of one kind that are kept
PASSAGE = 8  # words of a passage
_ONE_IN = 16  # passages kept of all there are, by their digest
_BETWEEN = "\x1f"
# Scripts without blanks between words count each character as a word.
WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")

Values = NDArray[np.uint64]


class RowDigests(NamedTuple):
    """prompts: what each assistant turn answers (none where nothing is asked); answers: the same with the turn, or a
    whole text; passages: runs of words of a running text, of which a fixed part is kept, wherever it is cut."""

    prompts: tuple[int, ...] = ()
    answers: tuple[int, ...] = ()
    passages: tuple[int, ...] = ()


def row_digests(example: Chat | Pair | Text) -> RowDigests:
    """The digests of a row of any shape: equal for equal words, whatever blanks, roles, system turn, tools or columns
    they come in. A conversation has a digest for each turn of the assistant."""
    if isinstance(example, Text):
        return RowDigests((), (_digest("answer", "", normal(example.text)),), tuple(passages(example.text)))
    messages = example.as_chat().messages if isinstance(example, Pair) else example.messages
    prompts, answers, before = list[int](), list[int](), list[str]()
    for message in messages:
        if message["role"] == "system":
            continue
        said = normal(_said(message))
        if message["role"] == "assistant":
            asked = _BETWEEN.join(before)
            if any(before):
                prompts.append(_digest("prompt", asked))
            answers.append(_digest("answer", asked, said))
        before.append(said)
    return RowDigests(tuple(prompts), tuple(answers))


def asked_digest(messages: Sequence[Message]) -> int | None:
    """The digest of what messages ask whose answer is still to come; None where they ask nothing."""
    said = [normal(_said(message)) for message in messages if message["role"] != "system"]
    return _digest("prompt", _BETWEEN.join(said)) if any(said) else None


def normal(text: str) -> str:
    """The text in Unicode's composed form (NFC), each run of blanks as one."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def passages(text: str) -> list[int]:
    """Digests of the runs of PASSAGE words, in lower case, that the kept part of all digests holds (Broder 1997,
    shingles kept by their value): the same words give the same ones in whatever window or document they stand."""
    words = np.array([_word(word) for word in WORDS.findall(text.lower())], dtype=np.uint64)
    if len(words) < PASSAGE:
        return []
    mixed = np.zeros(len(words) - PASSAGE + 1, dtype=np.uint64)
    for place in range(PASSAGE):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + words[place : place + len(mixed)]
    mixed ^= mixed >> np.uint64(32)  # the finaliser of splitmix64, so that every bit depends on every word
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(29)
    return [int(one) for one in np.unique(mixed) if int(one) % _ONE_IN == 0]


@lru_cache(maxsize=1 << 16)
def _word(word: str) -> int:
    return _digest("word", word)


def _said(message: Message) -> str:
    calls = [json.dumps(call, sort_keys=True, ensure_ascii=False, default=str) for call in calls_of(message)]
    return "\n".join([message["content"], *calls])


def _digest(*parts: str) -> int:
    text = "\x1e".join(parts).encode("utf-8", errors="backslashreplace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True, eq=False)
class DigestSet:
    """Digests, sorted. below: where there were more than MOST, the kept are those below it, a fair sample by value,
    and the others are not known; None where all are kept."""

    kept: Values
    below: int | None = None

    @classmethod
    def of(cls, digests: Iterable[int], most: int = MOST) -> DigestSet:
        """The set of the digests, at most so many of them."""
        return cls(np.unique(np.fromiter(digests, dtype=np.uint64)))._bounded(most)

    def __or__(self, other: DigestSet) -> DigestSet:
        bounds = [one.below for one in (self, other) if one.below is not None]
        joined = np.union1d(self.kept, other.kept)
        if bounds:
            joined = joined[joined < np.uint64(min(bounds))]
        return DigestSet(joined, min(bounds, default=None))._bounded(MOST)

    def _bounded(self, most: int) -> DigestSet:
        if len(self.kept) <= most:
            return self
        return DigestSet(self.kept[:most], int(self.kept[most]))

    def tells(self, digest: int) -> bool:
        """Whether the set knows if the digest is of it."""
        return self.below is None or digest < self.below

    def __contains__(self, digest: int) -> bool:
        place = int(np.searchsorted(self.kept, np.uint64(digest)))
        return place < len(self.kept) and int(self.kept[place]) == digest

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the digests as 8 bytes each, little-endian, in base64."""
        return {"digests": base64.b64encode(self.kept.astype("<u8").tobytes()).decode(), "below": self.below}

    @classmethod
    def parse(cls, value: Mapping[str, Any]) -> DigestSet:
        """The set that `as_dict` wrote. Raises DataError for anything else."""
        try:
            kept = np.frombuffer(base64.b64decode(value["digests"], validate=True), dtype="<u8").astype(np.uint64)
            below = None if value["below"] is None else int(value["below"])
        except (KeyError, TypeError, ValueError) as problem:
            raise DataError(f"the digests of rows cannot be read ({problem!r})") from None
        return cls(np.unique(kept), below)


KINDS = ("prompts", "answers", "passages")
Seen = dict[str, DigestSet]  # by kind


def seen_of(rows: Iterable[RowDigests]) -> Seen:
    """The digests of many rows, by kind."""
    found = list(rows)
    return {kind: DigestSet.of(one for row in found for one in getattr(row, kind)) for kind in KINDS}
