"""report.html: one page that tells of a run or several: curves, score card, spectra, answers beside the base's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from postil.errors import JudgeError
from postil.files import write_text
from postil.judging.card.model import Part
from postil.reporting.card_page import card_html
from postil.reporting.card_words import number, sentence
from postil.reporting.curves import Line, chart, legend, smooth
from postil.reporting.page import figure, page, table
from postil.reporting.reported import Reported, read_reported, run_of
from postil.reporting.spectra import charts

REPORT = "report.html"
ANSWERS = 12  # shown; all are in the predictions


def write_report(
    places: Sequence[str | Path], out: str | Path, *, predictions: str | Path | None = None, spectra: bool = True
) -> Path:
    """Write one self-contained page about runs or adapters; with several, a table of the sweep stands first.

    places: run directories, adapter directories, or those of fine-tuned models. predictions: a JSONL of `postil judge
    --predictions`, for a single place. Raises JudgeError for what cannot be read, StorageError.
    """
    if not places:
        raise JudgeError("a report needs a run or an adapter directory")
    if predictions is not None and len(places) > 1:
        raise JudgeError("predictions belong to one run; give one, or put predictions.jsonl into each run directory")
    found = [read_reported(place, predictions=predictions, spectra=spectra) for place in places]
    write_text(out, report_html(found))
    return Path(out)


def write_beside(place: str | Path, *, predictions: str | Path | None = None) -> Path | None:
    """Write report.html into the run directory that an adapter or model lies in; None where it lies in none."""
    run = run_of(Path(place))
    if run is None:
        return None
    return write_report([run], run / REPORT, predictions=predictions)


def report_html(found: Sequence[Reported], *, title: str = "", opening: Iterable[str] = ()) -> str:
    """The page, as text. title: in place of the runs' name or number; opening: HTML that follows it."""
    several = len(found) > 1
    heading = title or f"{len(found)} runs"
    body = [f"<h1>{escape(heading)}</h1>", *opening] if several else [*opening]
    title = f"postil: {title or (heading if several else found[0].name)}"
    if several:
        body += _sweep(found)
    for one in found:
        body += [f"<h{1 if len(found) == 1 else 2}>{escape(one.name)}</h{1 if len(found) == 1 else 2}>", *_told(one)]
    return page(title, body)


def _told(one: Reported) -> Iterator[str]:
    said = "Not judged yet: <code>postil judge</code> says whether it helped."
    yield f'<p class="lead">{escape(sentence(one.card)) if one.card is not None else said}</p>'
    facts = ", ".join(f"{escape(key)} {escape(value)}" for key, value in one.facts.items())
    yield f'<p class="asked">{facts}</p>' if facts else ""
    if one.card is not None:
        yield "<h2>Is it better, and what did it cost elsewhere?</h2>"
        yield from card_html(one.card)
    if one.log:
        yield '<h2>Learning</h2><div class="row">' + "".join(_learning(one.log)) + "</div>"
    if one.spectra:
        figures = "".join(figure(svg, escape(name), legend(lines)) for name, svg, lines in charts(one.spectra))
        middle = sorted(spectrum.entropy_rank for spectrum in one.spectra)[len(one.spectra) // 2]
        yield (
            f'<h2>What changed in the weights</h2><div class="row">{figures}</div><p class="asked">ΔW = s·B·A of '
            f"{len(one.spectra)} matrices; effective rank by the entropy of the singular values (Roy &amp; Vetterli "
            f"2007), {middle:.1f} in the middle.</p>"
        )
    yield from _answers(one.predictions)


def _learning(log: Sequence[dict[str, Any]]) -> Iterator[str]:
    def of(key: str) -> list[tuple[float, float]]:
        return [(float(line["step"]), float(line[key])) for line in log if isinstance(line.get(key), int | float)]

    losses = of("loss")
    last = f"step {log[-1]['step']}"
    smoothed = smooth([loss for _, loss in losses])
    lines = [Line("training", [(x, y) for (x, _), y in zip(losses, smoothed, strict=True)], losses)]
    held = of("valid_loss")
    if held:
        lines.append(Line("held out", held))
    yield figure(chart(lines, "loss by step", x_text=last), "loss, nats per target token", legend(lines))
    damage = [
        Line(name, of(key))
        for key, name in (("general_rise", "general text, over the base"), ("kl_loss", "KL to the base"))
    ]
    shown = [line for line in damage if line.points]
    if shown:
        svg = chart(shown, "general text by step", x_text=last)
        yield figure(svg, "general text, nats per token", legend(shown))
    norms = of("gradient_norm")
    if norms:
        line = Line("norm", [(x, y) for (x, _), y in zip(norms, smooth([y for _, y in norms]), strict=True)], norms)
        yield figure(chart([line], "gradient norm by step", x_text=last, log=True), "gradient norm before clipping")


def _answers(predictions: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The first target rows: what was asked, what each side said, and the references."""
    rows: dict[Any, dict[str, Any]] = {}
    for line in predictions:
        if line["set"] == "target" and "answer" in line and "side" in line:
            rows.setdefault(line.get("row"), {"asked": line}).update({line["side"]: line})
    if not rows:
        return
    sides = [side for side in ("base", "few-shot", "adapter") if any(side in row for row in rows.values())]
    body = []
    for row in list(rows.values())[:ANSWERS]:
        cells = [f'<span class="asked">{escape(_text(row["asked"].get("prompt")))}</span>']
        cells += [escape(_text(row[side]["answer"])) if side in row else "" for side in sides]
        references = row["asked"].get("references") or []
        cells.append(escape("\n".join(_text(one) for one in references[:3])))
        body.append(cells)
    yield "<h2>Answers beside the base's</h2>"
    yield table(("asked", *sides, "reference"), body).replace("<td>", '<td class="said">')
    if len(rows) > ANSWERS:
        yield f'<p class="asked">The first {ANSWERS} of {len(rows)} rows.</p>'


def _text(value: Any) -> str:
    """A prompt or reference as text: a conversation's last turn, calls as they are."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content") or value[-1]
    text = value if isinstance(value, str) else "" if value is None else str(value)
    return text if len(text) <= 600 else text[:600] + "…"


def _sweep(found: Sequence[Reported]) -> Iterator[str]:
    """The runs by what differs between them, with gain and damage, and a chart of one against the other."""
    keys = [key for key in dict.fromkeys(key for one in found for key in one.facts)
            if len({one.facts.get(key) for one in found}) > 1]  # fmt: skip
    rows, points = [], []
    for one in found:
        target, general = (_part(one, which) for which in ("target", "general"))
        rows.append([
            escape(one.name), *(escape(one.facts.get(key, "")) for key in keys), *_cells(target), *_cells(general)
        ])  # fmt: skip
        if target is not None and general is not None:
            gap = general.measures[general.main].difference.value
            points.append((gap, target.measures[target.main].adapter.value))
    count = len(keys)
    head = ("run", *keys, "target", "verdict", "general", "verdict")
    yield table(head, rows, (count + 1, count + 3))
    if len(points) > 1:
        lines = [Line("runs", (), sorted(points))]
        svg = chart(lines, "gain against damage", x_text=f"general {max(x for x, _ in points):+.3f}", zero=False)
        caption = "the target's measure by what general text lost, a dot a run"
        yield f'<div class="row">{figure(svg, caption)}</div>'


def _part(one: Reported, which: str) -> Part | None:
    if one.card is None:
        return None
    return one.card.target if which == "target" else one.card.general.get("nats")


def _cells(part: Part | None) -> list[str]:
    if part is None:
        return ["", "not judged"]
    found = part.measures[part.main]
    gap = number(found.difference.value, found, "+")
    return [f"{number(found.adapter.value, found)} ({gap})", f'<span class="verdict">{part.told(part.main)}</span>']
