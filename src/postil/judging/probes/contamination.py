"""Contamination: how many of the rows judged on are known from the training, by the digests in the adapter's card."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from postil.data import DataOptions
from postil.data.digests import KINDS, DigestSet, RowDigests, Seen, asked_digest, row_digests
from postil.data.formats import Chat, Pair, Text, detect, read_row
from postil.data.messages import check_messages
from postil.errors import DataError, JudgeError
from postil.judging.card.model import Contamination
from postil.judging.sets.target import Item

_LEAST = 2  # passages of a text that must be known
_SHARE = 0.5  # of its passages
_OPTIONS = DataOptions()
UNKNOWN = "contamination: the adapter does not tell what it was trained on, so these rows may have been among it"


def contamination_of(
    card: Mapping[str, Any], items: Sequence[Item], general: Sequence[Mapping[str, Any]], prompt: str = "{context}"
) -> tuple[Contamination | None, list[str]]:
    """How many questions of the target and rows of the general sets the training saw, and notes.

    card: what the adapter tells of its training (training.card); general: rows of any shape: {"text"}, prompts with
    or without an answer, messages, choices (led to by `prompt`, or as they are), pairs. None where the card tells of
    no rows. Raises JudgeError for digests that cannot be read.
    """
    told = card.get("seen")
    if not isinstance(told, Mapping) or told.get("trained") is None:
        return None, [UNKNOWN]
    trained, held_out, guarded = (_read(told.get(name)) for name in ("trained", "held_out", "general"))
    questions = [_of_item(item) for item in items]
    checked = [one for one in questions if _tells(one, (trained, held_out, guarded))]
    learned = [_known(one, (trained, guarded)) for one in checked]
    held = [_known(one, (held_out,)) and not known for one, known in zip(checked, learned, strict=True)]
    rows = [_of_row(row, prompt) for row in general]
    judged = [one for one in rows if _tells(one, (trained, held_out, guarded))]
    found = Contamination(
        target=sum(learned) + sum(held),
        target_rows=len(checked),
        general=sum(_known(one, (trained, held_out, guarded)) for one in judged),
        general_rows=len(judged),
        target_answers=sum(any(one in trained["answers"] for one in digests.answers) for digests in checked),
        target_held_out=sum(held),
    )
    asked = sum(any(one) for one in (*questions, *rows))
    return found, _notes(found, asked, bool(told.get("complete")))


def _notes(found: Contamination, rows: int, complete: bool) -> list[str]:
    """rows: how many there are that ask or say something."""
    notes = []
    if not complete:
        notes.append(
            "contamination: rows that came to the training as samples, or to an adapter that it went on from, are "
            "not known, so more may have been seen"
        )
    left_out = rows - found.target_rows - found.general_rows
    if left_out:
        notes.append(
            f"contamination: {left_out:,} rows could not be looked up, since of so much training data a part is kept"
        )
    if found.target:
        how = [f"{found.target_answers:,} of them with the answer"] if found.target_answers else []
        how += [f"{found.target_held_out:,} held out to choose its state by"] if found.target_held_out else []
        more = f" ({', '.join(how)})" if how else ""
        notes.append(
            f"contamination: {found.target:,} of {found.target_rows:,} questions of the target are of the training"
            f"{more}; judge on rows that it never saw"
        )
    if found.general:
        notes.append(
            f"contamination: {found.general:,} of {found.general_rows:,} general rows were trained on or guarded "
            "with; what a note was held to is no test of what it keeps"
        )
    return notes


def _read(told: Any) -> Seen:
    try:
        return {kind: DigestSet.parse((told or {}).get(kind) or DigestSet.of(()).as_dict()) for kind in KINDS}
    except (DataError, AttributeError) as problem:
        raise JudgeError(f"the adapter's card: `seen` cannot be read ({problem}); save the adapter anew") from None


def _of_item(item: Item) -> RowDigests:
    """A question of the target with each answer that it wants; running text as it is."""
    whole = row_digests(item.example)
    if isinstance(item.example, Text):
        return whole
    messages = (item.example.as_chat() if isinstance(item.example, Pair) else item.example).messages
    asked = messages[:-1]
    wanted = {
        row_digests(Chat([*asked, {"role": "assistant", "content": text}], None)).answers[-1]
        for text in item.value["references"]
    }
    return RowDigests(
        whole.prompts[-1:] if asked_digest(asked) is not None else (), (whole.answers[-1], *sorted(wanted))
    )


def _of_row(row: Mapping[str, Any], prompt: str) -> RowDigests:
    """A row of a general set, whatever its shape; choices by their context, a pair by its good sentence."""
    choices = row.get("choices")
    if isinstance(row.get("context"), str) and isinstance(choices, list):
        asked = (row["context"], prompt.replace("{context}", row["context"]))
        return _joined(row_digests(Pair(text, str(choice), "")) for text in asked for choice in choices)
    for good in ("text", "good", "sentence_good"):
        if isinstance(row.get(good), str):
            return row_digests(Text(row[good])) if row[good].strip() else RowDigests()
    try:
        if "messages" in row:
            messages = check_messages(row["messages"])
            if messages[-1]["role"] != "assistant":
                return _asked(messages)
        if isinstance(row.get("prompt"), str) and "completion" not in row:
            return _asked([{"role": "user", "content": row["prompt"]}])
        return row_digests(read_row(row, detect(row, _OPTIONS)))
    except DataError as problem:
        raise JudgeError(f"a general row cannot be looked up in the training: {problem}") from None


def _asked(messages: Sequence[dict[str, Any]]) -> RowDigests:
    found = asked_digest(messages)
    return RowDigests((found,) if found is not None else ())


def _joined(rows: Iterable[RowDigests]) -> RowDigests:
    found = list(rows)
    return RowDigests(*(tuple(dict.fromkeys(one for row in found for one in getattr(row, kind))) for kind in KINDS))


def _tells(row: RowDigests, sets: Sequence[Seen]) -> bool:
    """Whether every set knows of the row, or of a passage of it; a row without digests asks nothing to look up."""

    def told(kind: str) -> bool:
        return any(all(seen[kind].tells(one) for seen in sets) for one in getattr(row, kind))

    return any(told(kind) for kind in KINDS)


def _known(row: RowDigests, sets: Sequence[Seen]) -> bool:
    """Whether one of the sets holds what the row asks, its whole text, or half of the passages it is made of."""
    for seen in sets:
        if any(one in seen["prompts"] for one in row.prompts):
            return True
        if any(one in seen["answers"] for one in row.answers):
            return True
        passages = [one for one in row.passages if seen["passages"].tells(one)]
        held = sum(one in seen["passages"] for one in passages)
        if held >= _LEAST and held >= _SHARE * len(passages):
            return True
    return False
