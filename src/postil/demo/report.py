"""The demo's report: one self-contained HTML page with curves, scores, and answers beside the base's."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from postil.files import write_text

if TYPE_CHECKING:
    from postil.demo.run import Demo, TeamResult

STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --paper: #fdfcf8; --line: #d9d4c7; --note: #a3341f; --soft: #6b7080; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6df; --paper: #16181d; --line: #3a3d45; --note: #f0876f; --soft: #9aa0ad; } }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 Georgia, 'Times New Roman', serif; }
h1 { font-size: 2rem; margin: 0 0 .2rem } h2 { margin: 2.6rem 0 .6rem; font-size: 1.3rem } h3 { margin: 1.6rem 0 .4rem }
p.lead { color: var(--soft); margin-top: 0 }
table { border-collapse: collapse; width: 100%; font-size: .95rem } .wide { overflow-x: auto }
th, td { text-align: left; padding: .4rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.up { color: var(--note); font-weight: bold } code { font-size: .85em; overflow-wrap: anywhere }
figure { margin: 0; flex: 1 1 17rem } figcaption { font-size: .9rem; color: var(--soft) }
.row { display: flex; flex-wrap: wrap; gap: 1.4rem } svg { width: 100%; height: auto }
.asked { color: var(--soft) } td.note { border-left: 3px solid var(--note) }
"""


def write_report(demo: Demo, base: dict[str, str]) -> None:
    """Write `demo.report`; it asks nothing of the network."""
    same = demo.digest_before == demo.digest_after
    verdict = "All three notes are better than the bare base" if demo.good else "Not every note is measurably better"
    body = [
        "<h1>One base, three notes</h1>",
        f'<p class="lead">{escape(verdict)} on rows that none of them was trained on. Base: {escape(base["name"])}, '
        f"{base['parameters']} parameters, frozen. Each note: {demo.adapter_bytes / 1e6:.1f} MB on disk. "
        f"The whole run took {demo.seconds:.0f} s.</p>",
        "<h2>Is it better, and what did it cost elsewhere?</h2>",
        _table(demo),
        "<h2>Learning</h2>",
        '<div class="row">' + "".join(_figure(result) for result in demo.teams) + "</div>",
        "<h2>One process, one batch</h2>",
        f"<p>{demo.batch_rows} requests, for three adapters and for the bare base, were answered together in "
        f"{demo.batch_seconds:.0f} s. The base's live tensors before: <code>{demo.digest_before[:23]}…</code>, after: "
        f"<code>{demo.digest_after[:23]}…</code>: {'equal, bit for bit' if same else '<b>they differ</b>'}.</p>",
        "<h2>Answers beside the base's</h2>",
        *(_answers(result) for result in demo.teams),
    ]
    write_text(
        demo.report,
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>postil: one base, three notes</title><style>{STYLE}</style><body>{''.join(body)}</body></html>\n",
    )


def picture(demo: Demo) -> str:
    """The curves of all three teams side by side as one SVG, for a page that cannot hold HTML."""
    width = 340
    panels = []
    for index, result in enumerate(demo.teams):
        inner = _figure(result).partition("<svg")[2].partition(">")[2].partition("</svg>")[0]
        said = f"{result.team.name}: {result.team.measure} {result.base_score:.0f} → {result.score:.0f}"
        panels.append(
            f'<g transform="translate({index * width},24)"><text x="34" y="-8" font-size="13" fill="currentColor">'
            f"{escape(said)}</text>{inner.replace('var(--note)', '#a3341f')}</g>"
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * len(demo.teams)} 210" '
        f'font-family="Georgia, serif" color="#333" style="background:#fdfcf8">{"".join(panels)}</svg>\n'
    )


def _table(demo: Demo) -> str:
    rows = []
    for result in demo.teams:
        interval = f"{result.gain.low:+.2f} to {result.gain.high:+.2f}"
        rows.append(
            f"<tr><td>{escape(result.team.title)}<br><span class='asked'>{result.rows} rows, "
            f"{result.seconds:.0f} s</span></td><td>{escape(result.team.measure)}</td>"
            f"<td class='n'>{result.base_score:.1f}</td><td class='n up'>{result.score:.1f}</td>"
            f"<td class='n'>{result.base_loss:.2f}</td><td class='n up'>{result.loss:.2f}</td><td class='n'>{interval}</td>"
            f"<td class='n'>{result.general - demo.base_general:+.3f}</td>"
            f"<td>{'better' if result.better else 'no evidence'}</td></tr>"
        )
    return (
        "<div class='wide'><table><tr><th>team</th><th>measure</th><th class='n'>base</th><th class='n'>note</th>"
        "<th class='n'>nats/token base</th><th class='n'>note</th><th class='n'>gain, 95%</th>"
        "<th class='n'>general text</th><th>verdict</th></tr>" + "".join(rows) + "</table></div>"
        f"<p class='asked'>General text: change in nats per token on {demo.general_tokens:,} tokens that no note has "
        f"seen (base: {demo.base_general:.3f}); above zero is damage.</p>"
    )


def _figure(result: TeamResult) -> str:
    width, height, pad = 320, 180, 34
    steps = [step for step, _ in result.curve]
    losses = [loss for _, loss in result.curve]
    top, last = max(losses), max(steps)

    def place(step: float, loss: float) -> str:
        x = pad + (width - pad - 8) * step / max(last, 1)
        y = 8 + (height - pad - 8) * (1 - loss / top)
        return f"{x:.1f},{y:.1f}"

    smooth, value = [], losses[0]
    for loss in losses:
        value += 0.2 * (loss - value)
        smooth.append(value)
    line = " ".join(place(*point) for point in zip(steps, smooth, strict=True))
    dots = "".join(
        f'<circle cx="{x}" cy="{y}" r="1.6" fill="currentColor" opacity=".35"/>'
        for x, y in (place(*point).split(",") for point in result.curve)
    )
    ticks = "".join(
        f'<text x="{pad - 6}" y="{8 + (height - pad - 8) * (1 - share) + 4:.0f}" text-anchor="end" font-size="11" '
        f'fill="currentColor">{top * share:.1f}</text>'
        f'<line x1="{pad}" x2="{width - 8}" y1="{8 + (height - pad - 8) * (1 - share):.0f}" '
        f'y2="{8 + (height - pad - 8) * (1 - share):.0f}" stroke="currentColor" opacity=".15"/>'
        for share in (0.0, 0.5, 1.0)
    )
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="training loss of {result.team.name}">{ticks}'
        f'{dots}<polyline points="{line}" fill="none" stroke="var(--note)" stroke-width="2"/>'
        f'<text x="{width - 8}" y="{height - 10}" text-anchor="end" font-size="11" fill="currentColor">step {last}</text>'
        f"</svg><figcaption>{escape(result.team.title)}: training loss, nats per target token</figcaption></figure>"
    )


def _answers(result: TeamResult) -> str:
    rows = "".join(
        f"<tr><td class='asked'>{escape(asked)}</td><td>{escape(bare)}</td><td class='note'>{escape(mine)}</td>"
        f"<td>{escape(wanted)}</td></tr>"
        for asked, wanted, bare, mine in result.answers
    )
    return (
        f"<h3>{escape(result.team.title)}</h3><div class='wide'><table><tr><th>asked</th><th>bare base</th>"
        f"<th>with the note</th><th>reference</th></tr>{rows}</table></div>"
    )
