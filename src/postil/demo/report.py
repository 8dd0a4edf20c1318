"""The demo's report: one self-contained HTML page with curves, scores, and answers beside the base's."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from postil.files import write_text
from postil.reporting.curves import Line, chart, smooth, standalone
from postil.reporting.page import figure, page

if TYPE_CHECKING:
    from postil.demo.run import Demo, TeamResult


def write_report(demo: Demo, base: dict[str, str]) -> None:
    """Write `demo.report`; it asks nothing of the network."""
    same = demo.digest_before == demo.digest_after
    verdict = "All three notes are better than the bare base" if demo.good else "Not every note is measurably better"
    body = [
        "<h1>One base, three notes</h1>",
        f'<p class="lead">{escape(verdict)} on rows that none of them was trained on. Base: {escape(base["name"])}, '
        f"{base['parameters']} parameters, frozen. Each note: {demo.adapter_bytes / 1e6:.1f} MB on disk; it adapts the upper third of the layers. "
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
    write_text(demo.report, page("postil: one base, three notes", body))


def picture(demo: Demo) -> str:
    """The curves of all three teams side by side as one SVG, for a page that cannot hold HTML."""
    return standalone([
        (f"{result.team.name}: {result.team.measure} {result.base_score:.0f} → {result.score:.0f}", _curve(result), ())
        for result in demo.teams
    ])  # fmt: skip


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


def _curve(result: TeamResult) -> str:
    steps = [step for step, _ in result.curve]
    line = Line("loss", list(zip(steps, smooth([loss for _, loss in result.curve]), strict=True)), result.curve)
    return chart([line], f"training loss of {result.team.name}", x_text=f"step {max(steps)}")


def _figure(result: TeamResult) -> str:
    return figure(_curve(result), f"{escape(result.team.title)}: training loss, nats per target token")


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
