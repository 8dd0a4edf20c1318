"""From a source of rows to a Dataset: read, check, draft, encode, and an account of what was left out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from postil.data.digests import RowDigests, row_digests
from postil.data.encode import Draft, Tally, draft_chat, draft_pair, draft_text, encode
from postil.data.formats import Chat, Pair, Shape, Text, check_mapped, detect, read_row, rename
from postil.data.options import DataOptions
from postil.data.packs import Sample
from postil.data.report import DataReport
from postil.data.rows import BadRow, Row, Source, open_source
from postil.data.template import FIXED_DATE, template_hash
from postil.errors import DataError, listed
from postil.files import sha256_file, write_text

_NAMED = 5  # bad lines that an error names


@dataclass(frozen=True, slots=True)
class Dataset:
    """Samples ready to be packed, in the source's order, the report of how they came to be, the options, and the
    digests of what each row (by its number) asks and answers."""

    samples: list[Sample]
    report: DataReport
    options: DataOptions = field(default_factory=DataOptions)
    digests: dict[int, RowDigests] = field(default_factory=dict)


@dataclass(slots=True)
class _Reading:
    """What is found while the rows go by."""

    drafts: list[Draft] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    rows: int = 0
    shape: Shape | None = None
    format: str = ""
    columns: dict[str, None] = field(default_factory=dict)
    weighted: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    digests: dict[int, RowDigests] = field(default_factory=dict)


def load_data(
    source: str | Path | Sequence[Mapping[str, Any]],
    base_or_tokenizer: Any,
    options: DataOptions | None = None,
    *,
    context: int | None = None,
    side_directory: str | Path | None = None,
) -> Dataset:
    """Load training rows from a file, a hub data set (`owner/name[/config][:split]`) or a list of dicts.

    base_or_tokenizer: a Base (its tokenizer and context are used) or a fast tokenizer.
    context: the most tokens the base can take; None takes the Base's, or no limit for a bare tokenizer.
    side_directory: where bad lines go with `skip_bad_lines`, as `<file>.bad.jsonl`; None is beside the file
        (rows that come from no file are then only counted).
    Raises DataError naming the bad lines (the first five and their number), or saying that nothing is left.
    """
    options = options or DataOptions()
    tokenizer, context = _tokenizer_of(base_or_tokenizer, context)
    limit = _limit(options, context)
    opened = open_source(source)
    reading = _read(opened, tokenizer, options)
    if reading.rows == 0:
        raise DataError(f"{opened.name} is empty: it has no row.")
    if reading.bad and not (options.skip_bad_lines and reading.drafts):
        raise DataError(_bad_message(opened, reading, options.skip_bad_lines))
    check_mapped(options.columns, reading.columns)
    if options.too_long == "split" and reading.format != "text":
        raise DataError(f"too_long: split is for text rows only, and {opened.name} has {reading.format} rows.")
    tally = Tally()
    samples = encode(reading.drafts, tokenizer, limit=limit, too_long=options.too_long, tally=tally)
    if options.too_long == "error" and tally.too_long:
        raise DataError(
            f"{opened.name}: {len(tally.too_long)} rows are longer than {limit:,} tokens "
            f"(rows {listed(tally.too_long, _NAMED)}); shorten them, or choose too_long: drop or truncate."
        )
    if not samples:
        raise DataError(
            f"{opened.name}: no row is left to learn from; {len(tally.too_long)} are longer than the limit "
            f"({limit} tokens), {len(tally.no_target)} have no token with loss within it."
        )
    bad_file = _write_bad(opened, reading.bad, side_directory)
    report = _report(opened, reading, samples, tally, tokenizer, options, limit, bad_file)
    return Dataset(samples, report, options, reading.digests)


def _tokenizer_of(given: Any, context: int | None) -> tuple[Any, int | None]:
    tokenizer = given if hasattr(given, "apply_chat_template") else getattr(given, "tokenizer", None)
    if tokenizer is None:
        raise DataError("the base has no tokenizer; load it with load_base, or give the tokenizer.")
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("the tokenizer gives no character offsets; use the model's fast tokenizer (tokenizer.json).")
    return tokenizer, context if context is not None else getattr(given, "context", None)


def _limit(options: DataOptions, context: int | None) -> int | None:
    if options.max_length is not None and context is not None and options.max_length > context:
        raise DataError(f"max_length {options.max_length} is more than the {context} tokens the base can take.")
    return options.max_length if options.max_length is not None else context


def _read(source: Source, tokenizer: Any, options: DataOptions) -> _Reading:
    reading = _Reading()
    for row in source.rows:
        reading.rows += 1
        if isinstance(row, BadRow):
            reading.bad.append(row)
            continue
        if source.path is None:
            reading.digest.update(_canonical(row))
        try:
            reading.drafts.append(_draft_row(row, reading, tokenizer, options))
        except DataError as problem:
            reading.bad.append(BadRow(row.number, str(problem), row.text))
    return reading


def _draft_row(row: Row, reading: _Reading, tokenizer: Any, options: DataOptions) -> Draft:
    values = rename(row.value, options.columns)
    if reading.shape is None:
        reading.shape = detect(values, options)
    reading.columns.update(dict.fromkeys(values))
    example = read_row(values, reading.shape)
    if isinstance(example, Chat):
        reading.weighted += _has_weights(example)
    reading.format, draft = draft_of(row.number, example, tokenizer, options)
    reading.digests[row.number] = row_digests(example)
    return draft


def draft_of(number: int, example: Chat | Pair | Text, tokenizer: Any, options: DataOptions) -> tuple[str, Draft]:
    """How this base is shown an example: the format ("text", "raw", "prompt" or "chat") and the draft.

    Raises DataError, without the place, saying what is wrong with it.
    """
    if isinstance(example, Text):
        return "text", draft_text(number, example)
    if isinstance(example, Chat):
        return "chat", draft_chat(number, example, tokenizer, options.learn)
    if options.format == "raw" or (options.format == "auto" and not tokenizer.chat_template):
        return "raw", draft_pair(number, example, options.separator)
    return "prompt", draft_chat(number, example.as_chat(), tokenizer, options.learn)


def _has_weights(chat: Chat) -> bool:
    return any("weight" in message for message in chat.messages)


def _canonical(row: Row) -> bytes:
    """A row's bytes for the digest: one JSON line with sorted keys (half a surrogate pair as its escape)."""
    line = json.dumps(row.value, sort_keys=True, ensure_ascii=False, default=str) + "\n"
    return line.encode("utf-8", errors="backslashreplace")


def _bad_message(source: Source, reading: _Reading, skipping: bool) -> str:
    bad = reading.bad
    if len(bad) > 1 and not reading.drafts and len({row.error for row in bad}) == 1:
        what = f"{source.name}: no line can be read. {bad[0].error}."  # the fault is the file's, or the options'
        return f"{what} Mend this; all {len(bad):,} lines are alike in it."
    if len(bad) == 1:
        what = f"{source.where(bad[0].number)}: {bad[0].error}."
    else:
        first = "; ".join(f"{source.where(row.number)}: {row.error}" for row in bad[:_NAMED])
        more = f"; and {len(bad) - _NAMED:,} more" if len(bad) > _NAMED else ""
        what = f"{source.name} has {len(bad):,} bad lines. {first}{more}."
    if skipping:
        return f"{what} No usable line is left."
    return f"{what} Mend this, or leave such lines out with --skip-bad-lines (skip_bad_lines: true)."


def _write_bad(source: Source, bad: list[BadRow], directory: str | Path | None) -> str | None:
    file = source.path or Path("rows")
    if not bad or (directory is None and source.path is None):
        return None
    path = (Path(directory) if directory is not None else file.parent) / f"{file.name}.bad.jsonl"
    lines = [{"file": source.name, "line": row.number, "error": row.error, "text": row.text} for row in bad]
    # ASCII escapes, because the text of a bad line may hold what UTF-8 cannot
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def _report(
    source: Source,
    reading: _Reading,
    samples: list[Sample],
    tally: Tally,
    tokenizer: Any,
    options: DataOptions,
    limit: int | None,
    bad_file: str | None,
) -> DataReport:
    known = (*reading.shape.needs, *reading.shape.may) if reading.shape else ()
    unread = {"system"} if reading.format == "raw" else set()
    used = [name for name in known if name in reading.columns and name not in unread]
    templated = reading.format in ("chat", "prompt")
    return DataReport(
        source=source.name,
        sha256=sha256_file(source.path) if source.path is not None else reading.digest.hexdigest(),
        format=reading.format,
        shape=reading.shape.label if reading.shape else "",
        columns=tuple(options.columns.get(name, name) for name in used),
        ignored_columns=tuple(name for name in reading.columns if name not in used),
        template_hash=template_hash(tokenizer) if templated else None,
        rows=reading.rows,
        samples=len(samples),
        tokens=sum(len(sample.ids) for sample in samples),
        target_tokens=sum(sample.target_tokens for sample in samples),
        longest=max(len(sample.ids) for sample in samples),
        max_length=limit,
        truncated_rows=tuple(tally.truncated),
        split_rows=tuple(tally.split),
        too_long_rows=tuple(tally.too_long),
        no_target_rows=tuple(tally.no_target),
        bad_rows=tuple(row.number for row in reading.bad),
        bad_file=bad_file,
        notes=tuple(_notes(reading, tally, tokenizer, options)),
    )


def _notes(reading: _Reading, tally: Tally, tokenizer: Any, options: DataOptions) -> list[str]:
    notes = []
    if options.format == "auto" and reading.format == "raw":
        notes.append("the base has no chat template, so prompt and completion are plain text (format: raw)")
    if reading.weighted and options.learn != "weight":
        notes.append(f"{reading.weighted} rows carry message weights, which only learn: weight reads")
    if tally.straddled:
        rows = list(dict.fromkeys(tally.straddled))
        notes.append(
            f"in {len(rows)} rows (first: {rows[0]}) a token covers both the prompt's end and the target's "
            "start, and is not learned; a separator such as a newline keeps them apart"
        )
    if tally.no_stop:
        notes.append(
            f"in {len(tally.no_stop)} rows (first: {tally.no_stop[0]}) the chat template ends the answer "
            "without a special token, so the model will not learn where to stop"
        )
    if reading.format in ("chat", "prompt") and "strftime_now" in json.dumps(tokenizer.chat_template):
        notes.append(f"the chat template prints today's date; {FIXED_DATE} stands in for it, here and in generation")
    return notes
