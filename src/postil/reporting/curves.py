"""Charts as small hand-made SVG: lines over linear or logarithmic axes, and intervals beside zero."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, PAD, EDGE = 320, 180, 40, 8
A_ROW = 4  # names of lines beside one another
# Readable on light and dark paper; a page may set --note for the first.
COLOURS = ("var(--note, #a3341f)", "#3f7fbf", "#4e9a51", "#b8860b", "#8e6bb0", "#708090", "#c2588b")
FONT = "Georgia, 'Times New Roman', serif"

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """A curve through `points` (x ascending). dots: what was measured, drawn faintly behind it."""

    label: str
    points: Sequence[Point]
    dots: Sequence[Point] = ()
    dashed: bool = False


def smooth(values: Sequence[float], share: float = 0.2) -> list[float]:
    """An exponential moving average that begins at the first value."""
    out, value = [], values[0] if values else 0.0
    for one in values:
        value += share * (one - value)
        out.append(value)
    return out


def chart(
    lines: Sequence[Line], label: str, *, x_text: str = "", log: bool = False, zero: bool = True, marks: bool = False
) -> str:
    """An SVG of all lines on common axes; points that are not finite are left out, on a logarithmic axis those <= 0.

    label: what a screen reader says. x_text: at the right end of the x axis. zero: the y axis begins at 0 (not on a
    logarithmic one). marks: every point of a line is marked. Without any point, a chart that says so.
    """
    every = [point for line in lines for point in (*line.points, *line.dots) if _drawn(point, log)]
    if not every:
        middle = f'x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle"'
        return _svg(label, f"<text {middle} {_TEXT}>nothing to draw</text>")
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    low, high = _range([y for _, y in every], log, zero)

    def place(point: Point) -> tuple[float, float]:
        x = PAD + (WIDTH - PAD - EDGE) * (point[0] - left) / ((right - left) or 1)
        share = (_height(point[1], log) - low) / ((high - low) or 1)
        return x, EDGE + (HEIGHT - 34 - EDGE) * (1 - share)

    parts = [_ticks(low, high, log)]
    for index, line in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        for x, y in (place(point) for point in line.dots if _drawn(point, log)):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.6" fill="currentColor" opacity=".35"/>')
        placed = [place(point) for point in line.points if _drawn(point, log)]
        dash = ' stroke-dasharray="4 3"' if line.dashed else ""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        if marks:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in placed]
    if x_text:
        parts.append(f'<text x="{WIDTH - EDGE}" y="{HEIGHT - 10}" text-anchor="end" {_TEXT}>{escape(x_text)}</text>')
        parts.append(f'<text x="{PAD}" y="{HEIGHT - 10}" {_TEXT}>{_number(left)}</text>')
    return _svg(label, "".join(parts))


def legend(lines: Sequence[Line]) -> str:
    """The lines' labels in their colours, as HTML."""
    return " ".join(
        f'<span class="key"><i style="background:{COLOURS[index % len(COLOURS)]}"></i>{escape(line.label)}</span>'
        for index, line in enumerate(lines)
    )


def interval(low: float, value: float, high: float, reach: float, *, up: bool) -> str:
    """A difference's interval beside zero, on an axis from -reach to reach; up: right is better."""
    width, height = 150, 22
    reach = reach or 1.0

    def x(one: float) -> float:
        return width / 2 + (width / 2 - 4) * max(-1.0, min(1.0, one / reach))

    better = "right is better" if up else "left is better"
    return (
        f'<svg class="interval" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{value:.4g}, from {low:.4g} to {high:.4g}; {better}">'
        f'<line x1="{width / 2}" x2="{width / 2}" y1="2" y2="{height - 2}" stroke="currentColor" opacity=".4"/>'
        f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="11" y2="11" stroke="{COLOURS[0]}" stroke-width="3"/>'
        f'<circle cx="{x(value):.1f}" cy="11" r="4" fill="{COLOURS[0]}"/></svg>'
    )


def standalone(panels: Sequence[tuple[str, str, Sequence[Line]]]) -> str:
    """Charts side by side as one SVG file: panels of (title, chart, the lines to name below it)."""
    inner = []
    for index, (title, svg, lines) in enumerate(panels):
        body = svg.partition(">")[2].removesuffix("</svg>")
        inner.append(
            f'<g transform="translate({index * (WIDTH + 20)},24)"><text x="{PAD}" y="-8" font-size="13" '
            f'fill="currentColor">{escape(title)}</text>{body}{"".join(_names(lines))}</g>'
        )
    width = (WIDTH + 20) * max(len(panels), 1)
    height = HEIGHT + 30 + 16 * max((-(-len(lines) // A_ROW) for _, _, lines in panels), default=0)
    text = "".join(inner).replace("var(--note, #a3341f)", "#a3341f")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="{FONT}" '
        f'color="#333" style="background:#fdfcf8">{text}</svg>\n'
    )


def _names(lines: Sequence[Line]) -> Iterator[str]:
    for index, line in enumerate(lines):
        x, y = PAD + (index % A_ROW) * (WIDTH - PAD) // A_ROW, HEIGHT + 8 + 16 * (index // A_ROW)
        colour = COLOURS[index % len(COLOURS)]
        yield f'<text x="{x}" y="{y}" font-size="11" fill="{colour}">{escape(line.label)}</text>'


_TEXT = 'font-size="11" fill="currentColor"'


def _svg(label: str, body: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _drawn(point: Point, log: bool) -> bool:
    return all(math.isfinite(one) for one in point) and not (log and point[1] <= 0)


def _height(y: float, log: bool) -> float:
    return math.log10(y) if log else y


def _range(values: Sequence[float], log: bool, zero: bool) -> tuple[float, float]:
    """Where the y axis begins and ends: whole decades, or what the values need."""
    if log:
        return math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    low, high = min(values), max(values)
    if zero:
        return min(low, 0.0), max(high, 0.0)
    room = 0.05 * ((high - low) or abs(high) or 1.0)
    return low - room, high + room


def _ticks(low: float, high: float, log: bool) -> str:
    shares = [0.0, 0.5, 1.0]
    if log:
        decades = round(high - low)
        shares = [n / decades for n in range(0, decades + 1, max(1, -(-decades // 4)))] if decades else [0.0]
    parts = []
    for share in shares:
        value = low + share * (high - low)
        y = EDGE + (HEIGHT - 34 - EDGE) * (1 - share)
        text = _number(10**value if log else value)
        parts.append(
            f'<text x="{PAD - 6}" y="{y + 4:.0f}" text-anchor="end" {_TEXT}>{text}</text>'
            f'<line x1="{PAD}" x2="{WIDTH - EDGE}" y1="{y:.0f}" y2="{y:.0f}" stroke="currentColor" opacity=".15"/>'
        )
    return "".join(parts)


def _number(value: float) -> str:
    """Short: three significant digits."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
