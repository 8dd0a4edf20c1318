"""The target's held-out rows as items: one question each with all its references, its tokens, and its samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from postil.base import Base
from postil.data import DataOptions, Sample
from postil.data.encode import Draft, Tally, encode
from postil.data.formats import Chat, Pair, Shape, Text, check_mapped
from postil.data.load import draft_of
from postil.engine import Request
from postil.engine.request import prompt_ids
from postil.errors import DataError, JudgeError, RequestError, listed
from postil.judging.card.model import DataUsed
from postil.judging.sets.examples import Example, Training, conversation, example_of, question_key
from postil.judging.sets.read import From, Rows, chosen, read_rows, used

SHOTS = 4  # examples where nobody says how many
_MARGIN = 8  # tokens that an answer may have beyond a quarter more than the longest reference


@dataclass(frozen=True, slots=True)
class Item:
    """One question. rows: the numbers of the rows that ask it; value: the first of them with all `references`,
    what metrics read; samples: its places in Target.samples; ids: the prompt's tokens, none where the rows are
    running text; example: the first row as read."""

    rows: tuple[int, ...]
    value: dict[str, Any]
    samples: tuple[int, ...]
    example: Chat | Pair | Text
    ids: tuple[int, ...] = ()

    @property
    def prompt(self) -> str | list[dict[str, Any]]:
        """What was asked, as a file of predictions shows it."""
        if isinstance(self.example, Chat):
            return self.example.messages[:-1]
        return self.example.prompt if isinstance(self.example, Pair) else ""


@dataclass(frozen=True, slots=True)
class Target:
    """The items in the rows' order. samples: every row's tokens with loss on what it teaches. format: "chat",
    "prompt", "raw" or "text". max_new_tokens, stop: how answers are asked for. notes: for the user."""

    items: tuple[Item, ...]
    samples: tuple[Sample, ...]
    format: str
    options: DataOptions
    data: DataUsed
    max_new_tokens: int
    stop: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def answers(self) -> bool:
        """Whether there is anything to answer."""
        return self.format != "text"

    @property
    def values(self) -> list[dict[str, Any]]:
        """What metrics read, an item each."""
        return [item.value for item in self.items]

    def request(self, adapter: str | None, ids: Sequence[int], context: int | None) -> Request:
        """A question's tokens asked of an adapter or of the base, greedily, within the base's context."""
        room = math.inf if context is None else context - len(ids)
        most = int(min(self.max_new_tokens, room))
        return Request(ids=ids, adapter=adapter, max_new_tokens=most, stop=self.stop, raw=self.format == "raw")


@dataclass(slots=True)
class _Draft:
    """A row on its way: as read, and as this base is shown it."""

    read: Example
    draft: Draft


def read_target(
    source: From,
    base: Base,
    options: DataOptions,
    *,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    stop: tuple[str, ...] | None = None,
    seed: int = 0,
) -> Target:
    """The items of a file or list of rows (prompt/completion, messages, Alpaca, ShareGPT, or running text).

    Rows with an equal prompt are one item with several references; a column `references` gives them at once.
    Raises DataError naming the line, or that nothing is left.
    """
    rows = read_rows(source)
    fmt, drafts = _drafts(rows, base.tokenizer, options)
    groups = _grouped(drafts) if fmt != "text" else [[draft] for draft in drafts]
    groups = [groups[place] for place in chosen(len(groups), limit, seed, "target")]
    notes = []
    repeated = sum(len(group) > 1 for group in groups)
    if repeated:
        notes.append(
            f"{sum(map(len, groups)):,} rows ask {len(groups):,} questions: rows with an equal prompt are one "
            f"question with several references ({repeated:,} questions have more than one row)"
        )
    items, samples = _items(groups, base, "split" if fmt == "text" else "drop")
    if fmt != "text":
        items = _with_ids(items, base, options, fmt)
    if not items:
        raise DataError(f"{rows.name}: no row fits the base's context of {base.context} tokens.")
    lost = len(groups) - len(items)
    if lost:
        notes.append(f"{lost:,} questions are left out: too long for the base's context of {base.context} tokens")
    kept = [row for item in items for row in item.rows]
    by_number = {row.number: row for row in rows.rows}
    references = [text for item in items for text in item.value.get("references", ())]
    return Target(
        items=tuple(items),
        samples=tuple(samples),
        format=fmt,
        options=options,
        data=used(
            rows.name,
            [by_number[number] for number in sorted(kept)],
            sum(samples[place].target_tokens for item in items for place in item.samples),
        ),
        max_new_tokens=max_new_tokens or _longest(references, base.tokenizer),
        stop=stop if stop is not None else default_stop(fmt, references),
        notes=tuple(notes),
    )


def _drafts(rows: Rows, tokenizer: Any, options: DataOptions) -> tuple[str, list[_Draft]]:
    shape: Shape | None = None
    fmt, out = "", []
    for row in rows.rows:
        try:
            read, shape = example_of(row, shape, options)
            fmt, draft = draft_of(row.number, read.example, tokenizer, options)
        except (DataError, JudgeError) as problem:
            raise DataError(f"{rows.where(row)}: {problem}") from None
        out.append(_Draft(read, draft))
    check_mapped(options.columns, {name for one in out for name in one.read.value})
    return fmt, out


def _grouped(drafts: Sequence[_Draft]) -> list[list[_Draft]]:
    groups: dict[str, list[_Draft]] = {}
    for draft in drafts:
        groups.setdefault(draft.read.key, []).append(draft)
    return list(groups.values())


def _items(groups: Sequence[Sequence[_Draft]], base: Base, too_long: Any) -> tuple[list[Item], list[Sample]]:
    drafts = [one.draft for group in groups for one in group]
    samples = encode(drafts, base.tokenizer, limit=base.context, too_long=too_long, tally=Tally())
    places: dict[int, list[int]] = {}
    for place, sample in enumerate(samples):
        places.setdefault(sample.row, []).append(place)
    items = []
    for group in groups:
        read = [one.read for one in group]
        kept = tuple(place for one in read for place in places.get(one.row.number, ()))
        if kept:
            first, value = read[0], dict(read[0].value)
            if not isinstance(first.example, Text):
                value["references"] = [text for one in read for text in one.references]  # equal ones vote in SARI
            items.append(Item(tuple(one.row.number for one in read), value, kept, first.example))
    return items, samples


def _with_ids(items: Sequence[Item], base: Base, options: DataOptions, fmt: str) -> list[Item]:
    out = []
    for item in items:
        ids = _ids(_question(item.example, (), options, fmt), item, base)
        if base.context is None or len(ids) < base.context:
            out.append(replace(item, ids=tuple(ids)))
    return out


def _question(
    example: Chat | Pair | Text, examples: Sequence[Chat | Pair | Text], options: DataOptions, fmt: str
) -> Request:
    """A row's prompt as a Request, after worked examples: turns of the conversation, or plain text before it."""
    if fmt == "raw":
        assert isinstance(example, Pair)
        before = "".join(
            f"{one.prompt}{options.separator}{one.completion}\n\n" for one in examples if isinstance(one, Pair)
        )
        return Request(prompt=before + example.prompt + options.separator, raw=True)
    chat, tools = conversation(example)
    opening = [message for message in chat[:1] if message["role"] == "system"]
    shown = [message for one in examples for message in conversation(one)[0] if message["role"] != "system"]
    return Request(messages=(*opening, *shown, *chat[len(opening) : -1]), tools=tools)


def _ids(request: Request, item: Item, base: Base) -> list[int]:
    try:
        return prompt_ids(request, item.rows[0], base.tokenizer)
    except RequestError as problem:
        raise DataError(f"row {item.rows[0]}: {problem}") from None


@dataclass(frozen=True, slots=True)
class FewShot:
    """Every item's prompt after `shots` worked examples, as tokens; notes: for the user."""

    ids: tuple[list[int], ...]
    shots: int
    notes: tuple[str, ...] = ()


def few_shot(target: Target, training: Training, base: Base, shots: int | None, seed: int) -> FewShot:
    """Every item's prompt after rows of the training file, drawn once by the seed; shots: None takes SHOTS, or as
    many as there are.

    Rows that ask what the target asks are not drawn. Where a prompt does not fit the context, it has fewer
    examples. Raises JudgeError where there are fewer rows than the shots that were asked for.
    """
    asked = {question_key(item.example) for item in target.items}
    free = [one for one in training.examples if one.key not in asked]
    if shots is not None and len(free) < shots:
        raise JudgeError(
            f"{training.name} has {len(free)} rows that the target does not ask itself; --shots {shots} needs as many"
        )
    count = min(SHOTS, len(free)) if shots is None else shots
    if not count:
        said = f"few-shot: {training.name} has no row that the target does not ask itself, so no example is shown"
        return FewShot((), 0, (said,))
    examples = [free[place].example for place in chosen(len(free), count, seed, "shots")]
    out, fewer = [], 0
    for item in target.items:
        ids: list[int] = []
        for number in range(count, -1, -1):
            ids = _ids(_question(item.example, examples[:number], target.options, target.format), item, base)
            if base.context is None or len(ids) + target.max_new_tokens <= base.context:
                fewer += number < count
                break
        out.append(ids)
    notes = (
        (f"few-shot: {fewer:,} prompts have fewer than {count} examples, for the base's context",) if fewer else ()
    )
    return FewShot(tuple(out), count, notes)


def _longest(references: Sequence[str], tokenizer: Any) -> int:
    """Tokens an answer may have: a quarter more than the longest reference and a few."""
    if not references:
        return 1
    found = tokenizer(list(references), add_special_tokens=False, verbose=False)["input_ids"]
    return math.ceil(1.25 * max(len(ids) for ids in found)) + _MARGIN


def default_stop(fmt: str, references: Sequence[str]) -> tuple[str, ...]:
    """Where a raw answer ends: at a newline, or at a blank line where answers have newlines; a turn ends itself."""
    if fmt != "raw":
        return ()
    return next(((mark,) for mark in ("\n", "\n\n") if not any(mark in one.strip() for one in references)), ())


def check_answers(target: Target, metrics: Sequence[str]) -> None:
    """Raise JudgeError where metrics of answers are asked for and the rows are running text."""
    if metrics and not target.answers:
        raise JudgeError(
            f"{target.data.name} holds running text, which has no answers for {listed(metrics)}; leave --metrics out"
        )
