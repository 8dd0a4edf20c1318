"""Numeric answers: the last number of a text, or the one after ####, compared with a tolerance."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from postil.errors import JudgeError
from postil.judging.metrics.metric import Metric, Row
from postil.judging.metrics.options import Given, NumberOptions, chosen
from postil.judging.metrics.wanted import share, wanted

MARK = "####"
_MINUS = str.maketrans("−–", "--")
_COMMA_DECIMALS = str.maketrans(".,", ",.")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_SPACE = "[ \u00a0\u2009\u202f]"  # between groups of three digits: also no-break and thin ones
_FRACTIONS = "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"


def _exponent_named(name: str) -> str:
    """The pattern of ^6, ^{-6}, **6 or ⁶."""
    return rf"(?:(?:\^|\*\*)\{{?(?P<{name}>[-+]?\d{{1,3}})(?!\d)\}}?|(?P<{name}_raised>[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{{1,3}}))"


_NUMBER = re.compile(
    rf"""
    (?<![\d.])(?:                                # what is no number, nor what stands in it:
        \d+(?::\d+)+                             # a time or a ratio
      | \d{{4}}-\d\d-\d\d(?!\d) | \d+(?:/\d+){{2,}}   # a date
      | (?!\d{{1,3}}(?:\.\d{{3}})+(?![\d.]))\d+(?:\.\d+){{2,}}   # a version
      | 0[xX][0-9a-fA-F]+
    )
  | (?P<sign>(?<![\w.)])[-+](?=[$£€¥.\d\\{_FRACTIONS}]))?(?:[$£€¥]\s?)?
    (?:
        \\[dt]?frac\{{(?P<top>\d+)\}}\{{(?P<below>\d+)\}}
      | (?:
            (?P<comma>(?<![\d.])\d{{1,3}}(?:(?:\.\d{{3}})+,\d+|(?:{_SPACE}\d{{3}})+,\d+|(?:\.\d{{3}}){{2,}})(?![\d,]*\d))
          | (?P<point>
                (?<![\d.])(?:\d{{1,3}}(?:,\d{{3}})+(?!\d|,\d)|\d{{1,3}}(?:{_SPACE}\d{{3}})+(?!\d)|\d+)(?:\.\d+)?
              | (?<!\d)\.\d+
            )
        )
        (?:
            (?P<power>[eE][-+]?\d{{1,3}}\b)
          | \s?(?:[x×·*]|\\times|\\cdot)\s?10{_exponent_named("ten")}
          | {_exponent_named("own")}
          | /(?P<under>\d+)
          | \ (?P<over>\d+)/(?P<of>\d+)(?!/)
        )?
        (?:\s?(?P<part>[{_FRACTIONS}]))?
      | (?P<alone>[{_FRACTIONS}])
    )
    """,
    re.VERBOSE,
)


def number(given: Given) -> Metric:
    """The percentage of answers whose number is the wanted one.

    The wanted number stands in the row's `column` (by default "answer", where rows have one: the card says so), else
    in its wanted text.
    """
    options = chosen(NumberOptions, given)

    def right(answer: str, row: Row) -> bool:
        said = last_number(answer, decimal=options.decimal)
        return said is not None and any(
            math.isclose(said, value, rel_tol=1e-9, abs_tol=options.tolerance) for value in _wanted(row, options)
        )

    def look(rows: Sequence[Row]) -> list[str]:
        count = sum(_is_given(row.get(options.column)) for row in rows)
        if not count or "column" in given:
            return []
        return [
            f"number: the wanted number of {count:,} rows is read from their column {options.column!r} and not from "
            "their answer; another column is named by metric_options.number.column"
        ]

    return share("number", right, look)


def _is_given(value: object) -> bool:
    return isinstance(value, (int, float, str)) and not isinstance(value, bool)


def _wanted(row: Row, options: NumberOptions) -> list[float]:
    given = row.get(options.column)
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return [float(given)]
    texts = [given] if isinstance(given, str) else wanted(row)
    values = [last_number(text, decimal=options.decimal) for text in texts]
    for text, value in zip(texts, values, strict=True):
        if value is None:
            raise JudgeError(f"no number is in the wanted answer {text!r:.80}")
    return [value for value in values if value is not None]


def last_number(text: str, *, decimal: str = ".") -> float | None:
    """The first number after the last ####, if that mark is there and one follows; else the last number; else None.

    "1,234.5", "1.234,5", "1.234.567", "1 234 567" and "1 234,5" are one number each; "3,4" and "12,34" are two, and
    "1.234" lies between 1 and 2, unless `decimal` is a comma: then both change their parts. "3/4", "1 1/2", "½" and
    \\frac{3}{4} are fractions; "10^6", "10**6", "10⁶", "1e6" and "2 × 10^6" powers. A time or ratio (12:30), a date
    (1/2/2024, 2024-02-01), a version (1.2.3) and 0x1F are no numbers; neither is what is too large for one, or
    divided by 0. A percentage counts as it is written, and a word (million) not at all. A minus is a sign directly
    before a number, unless something is subtracted ("9-4" and "9 - 4" end in 4).
    """
    text = text.translate(_MINUS)
    if decimal == ",":
        text = text.translate(_COMMA_DECIMALS)
    if MARK in text:
        after = [value for value in map(_value, _NUMBER.finditer(text.rsplit(MARK, 1)[1])) if value is not None]
        if after:
            return after[0]
    values = [value for value in map(_value, _NUMBER.finditer(text)) if value is not None]
    return values[-1] if values else None


def _value(found: re.Match[str]) -> float | None:
    """The number of a match; None for what is none."""
    try:
        size = _size(found)
    except (OverflowError, ZeroDivisionError):
        return None
    if size is None or not math.isfinite(size):
        return None
    return -size if found["sign"] == "-" else size


def _size(found: re.Match[str]) -> float | None:
    if found["top"]:
        return int(found["top"]) / int(found["below"])
    if found["alone"]:
        return unicodedata.numeric(found["alone"])
    if found["comma"]:
        plain = re.sub(rf"\.|{_SPACE}", "", found["comma"]).replace(",", ".")
    elif found["point"]:
        plain = re.sub(rf",|{_SPACE}", "", found["point"])
    else:
        return None
    size = float(plain + (found["power"] or ""))
    if (exponent := _exponent(found, "ten")) is not None:
        size *= 10.0**exponent
    elif (exponent := _exponent(found, "own")) is not None:
        size **= exponent
    if found["under"]:
        size /= int(found["under"])
    if found["over"]:
        size += int(found["over"]) / int(found["of"])
    return size + (unicodedata.numeric(found["part"]) if found["part"] else 0.0)


def _exponent(found: re.Match[str], name: str) -> int | None:
    text = found[name] or (found[f"{name}_raised"] or "").translate(_RAISED)
    return int(text) if text else None
