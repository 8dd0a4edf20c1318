"""What loading found: counts, columns, hashes and all that was left out, as data and as printed lines."""

from __future__ import annotations

from dataclasses import dataclass

from postil.errors import listed


@dataclass(frozen=True, slots=True)
class DataReport:
    """The account of one load; rows are 1-based numbers in the source, tokens include masked ones.

    sha256: of the file's bytes as stored, or of the rows as canonical JSON where there is no file.
    template_hash: of the chat template and the tools block where they rendered the rows, else None.
    """

    source: str
    sha256: str
    format: str
    shape: str
    columns: tuple[str, ...]
    ignored_columns: tuple[str, ...]
    template_hash: str | None
    rows: int
    samples: int
    tokens: int
    target_tokens: int
    longest: int
    max_length: int | None
    truncated_rows: tuple[int, ...]
    split_rows: tuple[int, ...]
    too_long_rows: tuple[int, ...]
    no_target_rows: tuple[int, ...]
    bad_rows: tuple[int, ...]
    bad_file: str | None
    notes: tuple[str, ...]

    @property
    def truncated(self) -> int:
        """How many rows were cut."""
        return len(self.truncated_rows)

    @property
    def dropped_too_long(self) -> int:
        """How many rows were left out for their length."""
        return len(self.too_long_rows)

    @property
    def without_target(self) -> int:
        """How many rows were left out because no token of theirs has loss."""
        return len(self.no_target_rows)

    @property
    def bad_lines(self) -> int:
        """How many lines were left out as bad."""
        return len(self.bad_rows)

    def lines(self) -> list[str]:
        """The report as lines of plain text."""
        share = self.target_tokens / self.tokens if self.tokens else 0.0
        limit = "none" if self.max_length is None else f"{self.max_length:,}"
        learned = f"{self.target_tokens:,} learned ({share:.0%})"
        lines = [
            f"data: {self.source}, {self.rows:,} rows read as {self.shape} ({', '.join(self.columns)})",
            f"format {self.format}: {self.samples:,} samples, {self.tokens:,} tokens, {learned}",
            f"longest sample {self.longest:,} tokens, limit {limit}",
        ]
        if self.ignored_columns:
            lines.append(f"columns not read: {listed(self.ignored_columns)}")
        for rows, what in (
            (self.bad_rows, "bad, left out" + (f" (see {self.bad_file})" if self.bad_file else "")),
            (self.too_long_rows, "longer than the limit, left out"),
            (self.truncated_rows, "longer than the limit, cut at their end"),
            (self.split_rows, "longer than the limit, split"),
            (self.no_target_rows, "without a token to learn, left out"),
        ):
            if rows:
                lines.append(f"{len(rows):,} {'row' if len(rows) == 1 else 'rows'} {what}: {listed(rows, 5)}")
        lines.extend(f"note: {note}" for note in self.notes)
        return lines
