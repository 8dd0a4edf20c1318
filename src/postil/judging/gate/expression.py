"""The gate's expression: read by hand into frozen nodes, refused with its column, printed back as it was."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from postil.errors import JudgeError, nearest

End = Literal["", "low", "high"]
Anchor = Literal["", "base", "live", "few_shot", "trivial"]
Wanted = Literal["better", "worse", "kept", "none"]
ROOTS = ("target", "general", "slices", "leakage", "contamination")
ENDS: tuple[End, ...] = ("low", "high")
ANCHORS: tuple[Anchor, ...] = ("base", "live", "few_shot", "trivial")
VERDICTS: tuple[Wanted, ...] = ("better", "worse", "kept", "none")
SIGNS = ("<=", ">=", "<", ">")
WORDS = frozenset({"and", "or", "not", "is", *ANCHORS})
DEEPEST = 50  # nested parentheses and nots

_PATH = re.compile(r"""[^\W\d][^\s<>()"']*""")
_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_WORD = re.compile(r"\w+")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class Compare:
    """`path sign anchor ± offset`; without an anchor the right side is the number `offset` alone.

    end: "low" or "high", where the path ended so: the end of the interval of (adapter − anchor), row by row, put on
    the anchor's scale; the anchor is the base where the right side is a number. column: where it began, from 1.
    """

    path: str
    end: End
    sign: str
    anchor: Anchor
    offset: float
    column: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{_quoted(self.path + (f'.{self.end}' if self.end else ''))} {self.sign} {self.right}"

    @property
    def right(self) -> str:
        """The right side as text."""
        if not self.anchor:
            return number(self.offset)
        if not self.offset:
            return self.anchor
        return f"{self.anchor} {'-' if self.offset < 0 else '+'} {number(abs(self.offset))}"


@dataclass(frozen=True, slots=True)
class Judged:
    """`path is [not] verdict`."""

    path: str
    negated: bool
    verdict: Wanted
    column: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return f"{_quoted(self.path)} is {'not ' if self.negated else ''}{self.verdict}"


@dataclass(frozen=True, slots=True)
class Not:
    """`not part`."""

    part: Node

    def __str__(self) -> str:
        return f"not {_within(self.part, And, Or)}"


@dataclass(frozen=True, slots=True)
class And:
    """Two or more parts that must all hold."""

    parts: tuple[Node, ...]

    def __str__(self) -> str:
        return " and ".join(_within(part, And, Or) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Or:
    """Two or more parts of which one must hold."""

    parts: tuple[Node, ...]

    def __str__(self) -> str:
        return " or ".join(_within(part, Or) for part in self.parts)


Leaf = Compare | Judged
Node = Compare | Judged | Not | And | Or


def parse(text: str) -> Node:
    """The expression as a tree; `str` of it reads back to an equal one.

        either    = both {"or" both}            both = denied {"and" denied}
        denied    = "not" denied | "(" either ")" | path "is" ["not"] verdict | path sign right
        verdict   = "better" | "worse" | "kept" | "none"
        right     = ("base" | "live" | "few_shot" | "trivial") ["+" number | "-" number] | number
        sign      = "<" | "<=" | ">" | ">="

    A path begins with target, general, slices, leakage or contamination and may end in .low or .high; one with
    spaces or brackets stands in quotes. Contamination alone can be none, leakage only kept, and general as a whole
    only kept. Raises JudgeError with the column and the nearest known word.
    """
    reader = _Reader(text)
    node = reader.either(0)
    reader.skip()
    if reader.at < len(text):
        raise reader.refusal("expected 'and', 'or' or the end", ("and", "or"))
    return node


def leaves(node: Node) -> list[Leaf]:
    """The comparisons and verdicts of a tree, from left to right."""
    if isinstance(node, Compare | Judged):
        return [node]
    return [leaf for part in (node.parts if isinstance(node, And | Or) else (node.part,)) for leaf in leaves(part)]


def number(value: float) -> str:
    """The shortest text that reads back to the same number: 5, 0.05, 1e-07."""
    return repr(float(value)).removesuffix(".0")


def _within(part: Node, *looser: type) -> str:
    return f"({part})" if isinstance(part, looser) else str(part)


def _quoted(path: str) -> str:
    match = _PATH.fullmatch(path)
    return path if match else f"'{path}'" if '"' in path else f'"{path}"'


class _Reader:
    """One pass over the text; `at` is the place reached."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def either(self, depth: int) -> Node:
        parts = [self.both(depth)]
        while self.word("or"):
            parts.append(self.both(depth))
        return parts[0] if len(parts) == 1 else Or(tuple(parts))

    def both(self, depth: int) -> Node:
        parts = [self.denied(depth)]
        while self.word("and"):
            parts.append(self.denied(depth))
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def denied(self, depth: int) -> Node:
        if depth > DEEPEST:
            raise self.refusal(f"more than {DEEPEST} parentheses within each other")
        if self.word("not"):
            return Not(self.denied(depth + 1))
        if self.literal("("):
            node = self.either(depth + 1)
            if not self.literal(")"):
                raise self.refusal("expected ')', 'and' or 'or'", ("and", "or"))
            return node
        return self.condition()

    def condition(self) -> Node:
        self.skip()
        column = self.at + 1
        path = self.path()
        if self.word("is"):
            negated = self.word("not")
            for verdict in VERDICTS:
                if self.word(verdict):
                    _check_fit(path, verdict, column)
                    return Judged(path, negated, verdict, column)
            raise self.refusal("expected 'better', 'worse' or 'kept' after 'is'", (*VERDICTS, "not"))
        sign = next((sign for sign in SIGNS if self.literal(sign)), "")
        if not sign or self.text[self.at : self.at + 1] == "=":
            raise self.refusal(f"expected <, <=, >, >= or 'is' after {path!r}", ("is",))
        plain, end = _ended(path)
        anchor, offset = self.right()
        _check_fit(plain, "", column, anchor)
        return Compare(plain, end, sign, anchor, offset, column)

    def path(self) -> str:
        """A path as written, its quotes off, its root known."""
        start = self.at
        mark = self.text[start : start + 1]
        if mark and mark in "\"'":
            close = self.text.find(mark, start + 1)
            if close < 0:
                raise self.refusal("a quote is opened and never closed")
            path, self.at = self.text[start + 1 : close], close + 1
        else:
            match = _PATH.match(self.text, start)
            if match is None or match[0] in WORDS:
                raise self.refusal("expected a measure such as target.bleu or general.nats", (*ROOTS, "not"))
            path, self.at = match[0], match.end()
        if path.endswith("=") or "==" in path:
            raise JudgeError(_at(start, f"{path!r} compares with '='; a gate knows <, <=, > and >= only"))
        root = path.partition(".")[0]
        if root not in ROOTS:
            raise JudgeError(
                _at(start, f"unknown measure {path!r}{nearest(root, ROOTS)}; measures begin with {', '.join(ROOTS)}")
            )
        return path

    def right(self) -> tuple[Anchor, float]:
        for anchor in ANCHORS:
            if self.word(anchor):
                sign = -1.0 if self.literal("-") else 1.0 if self.literal("+") else 0.0
                return anchor, sign * self.number() if sign else 0.0
        return "", self.number(signed=True)

    def number(self, signed: bool = False) -> float:
        self.skip()
        match = _NUMBER.match(self.text, self.at)
        if match is None or (match[0].startswith("-") and not signed):
            wanted = "base, live, few_shot, trivial or a number" if signed else "a number"
            raise self.refusal(f"expected {wanted}", ANCHORS if signed else ())
        value = float(match[0])
        if value in (float("inf"), float("-inf")):
            raise self.refusal("the number is too large")
        self.at = match.end()
        return value

    def skip(self) -> None:
        match = _SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at

    def word(self, wanted: str) -> bool:
        """Take `wanted` where it is the next whole word."""
        self.skip()
        match = _WORD.match(self.text, self.at)
        if match is None or match[0] != wanted:
            return False
        self.at = match.end()
        return True

    def literal(self, wanted: str) -> bool:
        self.skip()
        if not self.text.startswith(wanted, self.at):
            return False
        self.at += len(wanted)
        return True

    def refusal(self, what: str, known: Iterable[str] = ()) -> JudgeError:
        """The error for the word that stands here."""
        self.skip()
        match = _WORD.match(self.text, self.at)
        found = match[0] if match else self.text[self.at : self.at + 1]
        hint = nearest(found, known) if found else ""
        return JudgeError(_at(self.at, f"{what}, found {found!r}{hint}" if found else f"{what}, found the end"))


def _check_fit(path: str, verdict: Wanted | Literal[""], column: int, anchor: Anchor = "") -> None:
    """Raise JudgeError where a path cannot be asked so."""
    root, _, rest = path.partition(".")
    told = ""
    if (root == "contamination") is not (verdict == "none") and (verdict or anchor):
        told = "'none' is for contamination, which is a count: `contamination is none`, `contamination.target <= 3`"
    elif root == "leakage" and (verdict in ("better", "worse") or anchor not in ("", "base")):
        told = "leakage is kept or not, or compared with base or a number: `leakage.adapter < base + 5`"
    elif root == "leakage" and verdict and rest:
        told = "leakage is kept as a whole: `leakage is kept`"
    elif path == "general" and verdict != "kept":
        told = "'general' is many measures: name one, such as general.nats, or ask `general is kept`"
    if told:
        raise JudgeError(_at(column - 1, told))


def _ended(path: str) -> tuple[str, End]:
    for end in ENDS:
        if path.endswith(f".{end}"):
            return path.removesuffix(f".{end}"), end
    return path, ""


def _at(place: int, what: str) -> str:
    return f"gate expression, column {place + 1}: {what}"
