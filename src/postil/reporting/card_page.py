"""A score card as HTML: verdicts in words, intervals drawn, slices, the λ curve and leakage."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from postil.judging.card.model import Comparison, Estimate, Part, ScoreCard
from postil.judging.gate.margins import bound, held
from postil.reporting.card_words import number
from postil.reporting.curves import Line, chart, interval, legend
from postil.reporting.page import figure, table

HEAD = ("measure", "base", "few-shot", "adapter", "difference", "", "verdict", "allowed", "visible from", "rows")
VERDICTS = {"better": "better", "no evidence": "not shown to be better", "worse": "worse"}
NUMERIC = (1, 2, 3, 4, 7, 8, 9)


def card_html(card: ScoreCard) -> Iterator[str]:
    """The card's sections."""
    parts = {"target": card.target} if card.target is not None else {}
    parts |= {f"general.{name}": part for name, part in card.general.items()}
    rows = []
    for path, part in parts.items():
        for name, measure in part.measures.items():
            shown = f"<b>{escape(path)}</b>.{escape(name)}"
            told, most = part.told(name), most_of(path, part, name)
            rows.append(_row(shown, measure, told, part.few_shot.get(name), most))
    yield table(HEAD, rows, NUMERIC)
    yield (
        '<p class="asked">Intervals of the difference, adapter less base, by a paired bootstrap over rows; a verdict '
        "is given only where the interval leaves out zero, and the target's main measure is better only where it is "
        "better than every baseline too. Allowed: what the gate lets a measure lose, by the "
        "interval's harmful end. Visible from: the smallest difference that so many rows would have shown with 80% "
        "power.</p>"
    )
    lines = [f"{escape(path)}: {escape(line)}" for path, part in parts.items() if (line := baseline_line(part))]
    yield from (f"<p>{line}.</p>" for line in lines)
    for path, part in parts.items():
        yield from _slices(path, part)
    yield from _curve(card)
    if card.leakage is not None:
        found = card.leakage
        rest = f", on rows it never saw {found.held_out.value:.1f}%" if found.held_out is not None else ""
        yield (
            f"<h3>Verbatim leakage</h3><p>Of {found.rows} training rows the adapter continues "
            f"{found.adapter.value:.1f}% ({found.adapter.low:.1f} to {found.adapter.high:.1f}) word for word for "
            f"{found.matched_tokens} tokens or more, the base {found.base.value:.1f}%{rest}.</p>"
        )
    sets = [
        f"{escape(path)}: {escape(part.data.name)}, {part.counted} <code>{escape(part.data.sha256[:12])}</code>"
        for path, part in parts.items()
    ]
    notes = [escape(note) for note in card.notes]
    items = "".join(f"<li>{one}</li>" for one in [*sets, *notes])
    yield (
        f"<details><summary>data, notes and the command</summary><ul>{items}</ul>"
        f"<p><code>{escape(card.command)}</code></p></details>"
    )


def most_of(path: str, part: Part, name: str) -> str:
    """How much worse the gate lets a general measure be by default; nothing where it does not ask for it."""
    where = path.removeprefix("general.")
    return bound(where, name, part.measures[name]) if where != path and name in held(where, part) else ""


def baseline_line(part: Part) -> str:
    """The best of what needs no learning, with the adapter beside it; empty where nothing was tried."""
    if part.best_baseline is None:
        return ""
    name, found = part.best_baseline
    gap = found.difference
    ends = f"{number(gap.value, found, '+')}, {number(gap.low, found, '+')} to {number(gap.high, found, '+')}"
    tried = ", ".join(one.replace("_", " ") for one in part.baselines if part.main in part.baselines[one])
    return (
        f"best of the baselines ({tried}): {name.replace('_', ' ')}, {part.main} {number(found.base.value, found)}; "
        f"the adapter is {VERDICTS[found.verdict]} ({ends})"
    )


def _row(name: str, found: Comparison, told: str, few: Estimate | None, most: str) -> list[str]:
    gap = found.difference
    reach = 1.25 * max(abs(gap.low), abs(gap.high), found.detectable)
    spread = f"; z {found.z:+.1f}" if found.z is not None else ""
    style = " worse" if told == "worse" else ""
    return [
        name,
        number(found.base.value, found),
        number(few.value, found) if few is not None else "",
        number(found.adapter.value, found),
        f"{number(gap.value, found, '+')} ({number(gap.low, found, '+')} to {number(gap.high, found, '+')})",
        interval(gap.low, gap.value, gap.high, reach, up=found.better == "higher"),
        f'<span class="verdict{style}">{told}</span>{spread}',
        escape(most),
        "too few rows" if found.too_few else f"{number(found.detectable, found)} {escape(found.unit)}",
        f"{found.rows:,}",
    ]


def _slices(path: str, part: Part) -> Iterator[str]:
    for column, values in part.slices.items():
        where = path.removeprefix("general.")
        rows = [
            _row(escape(value), found, found.told, None, bound(where, part.main, found, sliced=True))
            for value, measures in values.items()
            if (found := measures.get(part.main)) is not None
        ]
        yield (
            f"<details><summary>{escape(path)}.{escape(part.main)} by {escape(column)} ({len(rows)} values)</summary>"
            f"{table((column, *HEAD[1:]), rows, NUMERIC)}</details>"
        )


def _curve(card: ScoreCard) -> Iterator[str]:
    if not card.curve:
        return
    points = sorted(card.curve, key=lambda point: point.scale)
    figures = []
    target = [Line("target", [(p.scale, p.target) for p in points if p.target is not None])]
    if card.target is not None and target[0].points:
        name = card.target.main
        svg = chart(target, f"{name} by scale", x_text=f"scale {points[-1].scale:g}", zero=False, marks=True)
        figures.append(figure(svg, f"{escape(name)} of the target"))
    nats = [
        Line("target", [(p.scale, p.target_nats) for p in points if p.target_nats is not None]),
        Line("general", [(p.scale, p.general_nats) for p in points if p.general_nats is not None]),
    ]
    shown = [line for line in nats if line.points]
    if shown:
        svg = chart(shown, "nats by scale", x_text=f"scale {points[-1].scale:g}", zero=False, marks=True)
        figures.append(figure(svg, "nats per token", legend(shown)))
    yield '<h3>The adapter\'s term scaled</h3><div class="row">' + "".join(figures) + "</div>"
    yield '<p class="asked">0 is the bare base, 1 the adapter as it is (λ in W + λ·s·B·A).</p>'
