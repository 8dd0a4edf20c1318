"""General ability beside the target's rows, prose and chat: what is watched, and what an adapter is held to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from postil.base import Base
from postil.data import Sample
from postil.data.digests import Seen
from postil.errors import RecipeError
from postil.seeds import derive
from postil.training.options import Settled, TrainOptions

WINDOW = 512  # tokens of a watched window
CHATS = 4  # watched conversations for each watched window


@dataclass(frozen=True, slots=True)
class Documents:
    """What must not get worse. prose: running text (the samples of one row are one document); chat: conversations,
    loss on the base's own answer, or on the one that the row brought."""

    prose: Sequence[Sample] = ()
    chat: Sequence[Sample] = ()
    sha256: str | None = None  # of the rows as read
    seen: Seen | None = None  # their digests
    left_out: int = 0  # conversations longer than the base's context, or with nothing to learn

    def __len__(self) -> int:
        return len(self.prose) + len(self.chat)


@dataclass(frozen=True, slots=True)
class General:
    """Windows of prose and whole conversations, watched and held from different documents; a `row` is 0: they have
    none.

    watched: at most options.watch_windows of WINDOW tokens; held: of options.general_tokens tokens each.
    chat_watched: at most CHATS times as many conversations. sha256, left_out: as in Documents.
    """

    watched: tuple[Sample, ...]
    held: tuple[Sample, ...]
    documents: int
    chat_watched: tuple[Sample, ...] = ()
    chat_held: tuple[Sample, ...] = ()
    sha256: str | None = None
    left_out: int = 0

    @property
    def given(self) -> tuple[tuple[Sample, ...], ...]:
        """Everything that is watched and held, as it was given: where the rows are known by their digest, of a
        conversation what comes before its answer, for the base's own may be another on another machine."""
        chats = self.chat_watched, self.chat_held
        if self.sha256 is not None:
            chats = tuple(map(_asked, chats[0])), tuple(map(_asked, chats[1]))
        return self.watched, self.held, *chats

    @property
    def all_held(self) -> tuple[Sample, ...]:
        """Everything that is held to, of both kinds."""
        return (*self.held, *self.chat_held)

    @property
    def watched_tokens(self) -> int:
        """All tokens of a look at what is watched."""
        return sum(len(one.ids) for one in (*self.watched, *self.chat_watched))

    def mixed(self, options: Settled, step: int) -> list[Sample]:
        """The rows that join those of step `step` (general_share), half of them conversations where there are both
        kinds, a pure function of seed and step."""
        count = max(1, round(options.general_share * options.batch_size)) if options.general_share else 0
        before, after = (step - 1) * count, step * count  # places of its rows among those of all steps
        if not (self.held and self.chat_held):
            return _drawn((*self.held, *self.chat_held), options.seed, "mix", before, after)
        prose = _drawn(self.held, options.seed, "mix", before // 2, after // 2)  # one alone is of each kind by turns
        return prose + _drawn(self.chat_held, options.seed, "mix chat", -(-before // 2), -(-after // 2))

    def compared(self, options: Settled, step: int) -> dict[str, list[Sample]]:
        """By kind, the kl_rows rows on which step `step` compares adapter and base (kl_weight), likewise."""
        count = options.kl_rows if options.kl_weight else 0
        before, after = (step - 1) * count, step * count
        drawn = {
            "prose": _drawn(self.held, options.seed, "kl", before, after),
            "chat": _drawn(self.chat_held, options.seed, "kl chat", before, after),
        }
        return {kind: rows for kind, rows in drawn.items() if rows}

    def lines(self, options: Settled) -> list[str]:
        """What is done with them, in sentences for the user."""
        kinds = [("prose", self.watched), ("chat", self.chat_watched)]
        counts = [(kind, sum(one.target_tokens for one in watched)) for kind, watched in kinds if watched]
        told = " and ".join(f"{tokens:,} tokens of {kind}" for kind, tokens in counts)
        bound = "" if options.guard is None else f"; no state more than {options.guard:g} nats above the base is kept"
        lines = [f"general ability: {self.documents} documents; {told} watched at each validation{bound}"]
        if self.left_out:
            lines.append(
                f"{self.left_out} conversations left out: longer than the base's context, or without an answer"
            )
        held = [
            *([f"{{n}} of prose ({options.general_tokens} tokens)"] if self.held else []),
            *(["{n} of chat"] if self.chat_held else []),
        ]
        if options.kl_weight:
            rows = " and ".join(held).format(n=options.kl_rows)
            lines.append(f"each step: {options.kl_weight:g} × KL to the base over general rows, {rows}")
        if options.general_share:
            count = max(1, round(options.general_share * options.batch_size))
            lines.append(f"each step: {count} general rows among its rows")
        return lines


def wants_general(options: TrainOptions) -> bool:
    """Whether general rows are to be read: an option needs them, or an adapter is held to them by default."""
    held = options.method != "full" if options.kl_weight is None else options.kl_weight > 0
    return options.guard is not None or held or options.general_share > 0


def check_general(options: TrainOptions, given: bool) -> None:
    """Raise RecipeError where an option needs general rows and none are given."""
    wanted = {
        "guard": options.guard is not None,
        "kl_weight": bool(options.kl_weight),
        "general_share": options.general_share > 0,
    }
    for name in [name for name, on in wanted.items() if on and not given][:1]:
        raise RecipeError(
            f"training.{name} needs general rows: give general=general_documents(model) for those that ship with "
            'postil, or rows {"text"}, {"prompt"} or {"messages"} of your own of what must not get worse'
        )


def split_general(documents: Documents | Sequence[Sample], options: TrainOptions, base: Base) -> General:
    """The documents to watch and those to hold to: half of the prose each, a quarter of the chats and the rest, for
    what an adapter must not answer elsewhere has many kinds; the parts never change.

    The watched windows are spread evenly over their half. The split depends on the documents alone, so that
    runs with other options or seeds watch the same. A document's end of sequence parts it from the next
    and is neither measured nor learned. Raises RecipeError where there is too little.
    """
    given = documents if isinstance(documents, Documents) else Documents(prose=documents)
    end = getattr(base.tokenizer, "eos_token_id", None)
    whole = [list(parts) for _, parts in groupby((_open(one, end) for one in given.prose), key=lambda one: one.row)]
    halves = _parted(whole, 2)
    watch, hold = (min(size, base.context or size) for size in (WINDOW, options.general_tokens))
    watched, held = _windows(halves[0], watch), _windows(halves[1], hold)
    chats = [replace(one, row=0) for one in given.chat if one.target_tokens]
    chat_watched, chat_held = _parted(chats, 4)
    if not (watched or chat_watched):
        raise RecipeError("the general rows have no document of two tokens or more to watch; give a longer one")
    if not (held or chat_held) and (options.kl_weight or options.general_share):
        raise RecipeError(
            f"there is {len(whole) + len(chats)} general document, and some must be watched; "
            "kl_weight and general_share need at least one more"
        )
    return General(
        tuple(_spread(watched, options.watch_windows)), tuple(held), len(whole) + len(chats),
        tuple(_spread(chat_watched, CHATS * options.watch_windows)), tuple(chat_held), given.sha256,
        given.left_out,
    )  # fmt: skip


def _asked(sample: Sample) -> Sample:
    """What stands before a conversation's first target."""
    first = int(np.flatnonzero(sample.weights)[0])
    return replace(sample, ids=sample.ids[:first], weights=sample.weights[:first])


def _parted(documents: Sequence[Any], part: int) -> tuple[list[Any], list[Any]]:
    """One `part`th of the documents and the rest, by chance and always the same."""
    order = np.random.Generator(np.random.PCG64(derive(0, "general"))).permutation(len(documents))
    first = -(-len(documents) // part)
    return [documents[int(index)] for index in order[:first]], [documents[int(index)] for index in order[first:]]


def _spread(found: Sequence[Sample], most: int) -> list[Sample]:
    count = min(most, len(found))
    return [found[index * len(found) // count] for index in range(count)]


def _open(sample: Sample, end: int | None) -> Sample:
    """The sample without loss on its end of sequence."""
    if not len(sample.ids) or sample.ids[-1] != end:
        return sample
    weights = sample.weights.copy()
    weights[-1] = 0.0
    return replace(sample, weights=weights)


def _windows(documents: Iterable[Sequence[Sample]], size: int) -> list[Sample]:
    """The documents end to end, cut into windows of `size` tokens; a shorter rest only where there is no other."""
    parts = [sample for document in documents for sample in document]
    if not parts:
        return []
    ids = np.concatenate([sample.ids for sample in parts])
    weights = np.concatenate([sample.weights for sample in parts])
    windows: list[Sample] = []
    for start in range(0, len(ids), size):
        weight = weights[start : start + size].copy()
        weight[0] = 0.0
        if weight.any() and (len(weight) == size or not windows):
            windows.append(Sample(ids[start : start + size], weight, row=0))
    return windows


def _drawn(rows: Sequence[Sample], seed: int, purpose: str, before: int, after: int) -> list[Sample]:
    """The rows drawn next where `before` were, up to `after`: every one once before any comes again; none where
    there are none."""
    out = []
    for place in range(before, after) if rows else ():
        again, index = divmod(place, len(rows))
        out.append(rows[int(_order(len(rows), derive(seed, "general", purpose, again))[index])])
    return out


@lru_cache(maxsize=4)
def _order(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.PCG64(seed)).permutation(count)
