"""Numeric answers: the last number of a text, or the one after ####, compared with a tolerance."""

from __future__ import annotations

import math
import re

from postil.errors import JudgeError
from postil.judging.metrics.metric import Metric, Row
from postil.judging.metrics.options import Given, NumberOptions, chosen
from postil.judging.metrics.wanted import share, wanted

MARK = "####"
_MINUS = str.maketrans("−–", "--")
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)])[-+](?=[$£€¥.\d]))?[$£€¥]?\s?"
    r"(?P<digits>(?<![\d.])(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?P<power>[eE][-+]?\d{1,3}\b)?"
)


def number(given: Given) -> Metric:
    """The percentage of answers whose number is the wanted one.

    The wanted number stands in the row's `column` (by default "answer"), else in its wanted text.
    """
    options = chosen(NumberOptions, given)

    def right(answer: str, row: Row) -> bool:
        said = last_number(answer)
        return said is not None and any(
            math.isclose(said, value, rel_tol=1e-9, abs_tol=options.tolerance) for value in _wanted(row, options)
        )

    return share("number", right)


def _wanted(row: Row, options: NumberOptions) -> list[float]:
    given = row.get(options.column)
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return [float(given)]
    texts = [given] if isinstance(given, str) else wanted(row)
    values = [last_number(text) for text in texts]
    for text, value in zip(texts, values, strict=True):
        if value is None:
            raise JudgeError(f"no number is in the wanted answer {text!r:.80}")
    return [value for value in values if value is not None]


def last_number(text: str) -> float | None:
    """The first number after the last ####, if that mark is there and one follows; else the last number; else None.

    "1,234.5" is one number and "3,4" two; a minus counts as a sign directly before a number, unless something is
    subtracted ("9-4" and "9 - 4" end in 4).
    """
    text = text.translate(_MINUS)
    if MARK in text and (found := _NUMBER.search(text.rsplit(MARK, 1)[1])):
        return _value(found)
    values = [_value(found) for found in _NUMBER.finditer(text)]
    return values[-1] if values else None


def _value(found: re.Match[str]) -> float:
    return float((found["sign"] or "") + found["digits"].replace(",", "") + (found["power"] or ""))
