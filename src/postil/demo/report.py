"""The demo's page and picture: what was published, answered and rolled back, before the report of its three runs."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING

from postil.demo.teams import CUT, TEAMS
from postil.files import write_text
from postil.registry.version import short
from postil.reporting.curves import Line, chart, smooth, standalone
from postil.reporting.page import table
from postil.reporting.report import report_html
from postil.reporting.reported import read_reported

if TYPE_CHECKING:
    from postil.demo.run import Demo
    from postil.demo.work import Plan

SHOWN = 4  # questions of the name that was rolled back


def write_page(demo: Demo, plan: Plan) -> None:
    """Write `demo.report`; it asks nothing of the network."""
    runs = [read_reported(plan.run(team)) for team in TEAMS]
    write_text(demo.report, report_html(runs, title="one base, three notes", opening=_opening(demo)))


def picture(demo: Demo, plan: Plan) -> str:
    """The curves of all three teams side by side as one SVG, for a page that cannot hold HTML."""
    panels = []
    for result in demo.teams:
        log = read_reported(plan.run(result.team), spectra=False).log
        losses = [(float(line["step"]), float(line["loss"])) for line in log if "loss" in line]
        smoothed = smooth([loss for _, loss in losses])
        line = Line("loss", [(x, y) for (x, _), y in zip(losses, smoothed, strict=True)], losses)
        svg = chart([line], f"training loss of {result.team.name}", x_text=f"step {len(losses)}")
        target = result.target
        title = f"{result.team.name}: {result.team.measure} {target.base.value:.0f} → {target.adapter.value:.0f}"
        panels.append((title, svg, ()))
    return standalone(panels)


def _opening(demo: Demo) -> Iterator[str]:
    said = "All three notes are better than the bare base, and the registry's policy let them into service"
    if any(result.refused for result in demo.teams):
        said = "Not every note was let into service"
    yield (
        f'<p class="lead">{said}. Base: {escape(demo.base["name"])}, {demo.base["parameters"]} parameters, frozen; '
        f"each note adapts the upper third of its layers. The whole run took {demo.seconds:.0f} s.</p>"
    )
    if any(result.card.scope == "task" for result in demo.teams):
        yield (
            "<p>A note of scope task is only ever asked its own task. It was held to the base's prose while it was "
            "trained, and the gate asks that prose is kept; how it would chat is not asked, and was not measured.</p>"
        )
    rows = []
    for result in demo.teams:
        target, live = result.target, demo.service.live.get(result.team.name)
        why = result.refused or demo.service.passed.get(result.team.name, "")
        rows.append([
            escape(result.team.title), escape(result.team.measure), f"{target.base.value:.1f}",
            f"{target.adapter.value:.1f}", f"<code>{short(live.version)}</code>" if live is not None else "none",
            f'<span class="verdict">{escape(result.verdict)}</span><br><span class="asked">{escape(why)}</span>',
        ])  # fmt: skip
    yield "<h2>Judged, and published by each name's policy</h2>"
    yield table(("team", "measure", "base", "note", "live version", "what the policy said"), rows, (2, 3))
    yield from _served(demo)
    yield from _rolled(demo)


def _served(demo: Demo) -> Iterator[str]:
    service, same = demo.service, demo.unchanged
    digest = min(demo.digests)
    yield "<h2>One process, one batch</h2>"
    yield (
        f"<p>{service.requests} requests, for the live versions of {len(service.live)} names and for the bare base, "
        f"were answered together in {service.seconds:.0f} s. The base's live tensors "
        f"(<code>{escape(digest[:16])}…</code>), "
        "before and after, in every process that trained or answered: "
        f"{'equal, bit for bit' if same else '<b>they differ</b>'}.</p>"
    )


def _rolled(demo: Demo) -> Iterator[str]:
    service = demo.service
    yield f"<h2>{escape(CUT)}: a smaller second version, rolled back and forward</h2>"
    for what, why in service.refused.items():
        if what not in {team.name for team in TEAMS}:
            yield f"<p>{escape(what)}: {escape(why)}</p>"
    if service.back is None or service.forward is None:
        yield "<p>It was not rolled back: it has no second version in service.</p>"
    else:
        live, back, forward = service.live[CUT], service.back, service.forward
        other = sum(one != two for one, two in zip(live.answers, back.answers, strict=True))
        same = sum(one == two for one, two in zip(live.answers, forward.answers, strict=True))
        yield (
            f"<p>Version <code>{short(live.version)}</code> (cut) answered in the batch; after the roll-back "
            f"<code>{short(back.version)}</code> answered {other} of {len(back.answers)} questions otherwise; "
            f"promoted again, <code>{short(forward.version)}</code> gave {same} of {len(forward.answers)} word for "
            "word.</p>"
        )
        bare = service.base[CUT]
        lines = zip(bare, live.answers, back.answers, forward.answers, strict=True)
        cells = [[escape(one) for one in line] for line in lines][:SHOWN]
        yield table(("bare base", "in the batch (cut)", "rolled back", "forward again"), cells)
    rows = [
        [escape(name), str(event.number), escape(event.action), f"<code>{short(event.version)}</code>",
         escape(event.sentence)]
        for name, events in service.history.items() for event in events
    ]  # fmt: skip
    yield "<details><summary>what the registry has written down</summary>"
    yield table(("name", "event", "act", "version", "the policy's answer"), rows)
    yield "</details>"
