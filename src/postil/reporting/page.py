"""A report's page: one self-contained HTML file in the house style, without a request to anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --paper: #fdfcf8; --line: #d9d4c7; --note: #a3341f;
  --soft: #6b7080 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e6df; --paper: #16181d; --line: #3a3d45; --note: #f0876f; --soft: #9aa0ad; } }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 Georgia, 'Times New Roman', serif; overflow-wrap: break-word }
h1 { font-size: 2rem; margin: 0 0 .2rem } h2 { margin: 2.6rem 0 .6rem; font-size: 1.3rem }
h3 { margin: 1.6rem 0 .4rem }
p.lead { color: var(--soft); margin-top: 0 }
table { border-collapse: collapse; width: 100%; font-size: .95rem } .wide { overflow-x: auto }
th, td { text-align: left; padding: .4rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.up { color: var(--note); font-weight: bold } code { font-size: .85em; overflow-wrap: anywhere }
figure { margin: 0; flex: 1 1 17rem; min-width: 0 } figcaption { font-size: .9rem; color: var(--soft) }
.row { display: flex; flex-wrap: wrap; gap: 1.4rem } svg { width: 100%; height: auto }
svg.interval { width: 9.5rem; min-width: 9.5rem; height: 1.4rem }
.key { margin-right: .8rem; white-space: nowrap } .key i { display: inline-block; width: .8rem; height: .25rem;
  margin-right: .35rem; vertical-align: middle }
.asked { color: var(--soft) } td.note { border-left: 3px solid var(--note) }
td.said { min-width: 10rem; white-space: pre-wrap }
.verdict { font-weight: bold; white-space: nowrap } .worse { color: var(--note) }
details { margin: .6rem 0 } summary { cursor: pointer; color: var(--soft) }
@media (max-width: 34rem) { body { padding: 1.2rem .8rem 3rem } h1 { font-size: 1.5rem }
  th, td { padding: .35rem .45rem } }
"""


def page(title: str, body: Iterable[str]) -> str:
    """The whole page; `body` is HTML, `title` plain text."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    """A table that scrolls sideways where it is too wide. head: plain text; rows: HTML cells; numeric: columns set
    to the right."""
    right = set(numeric)

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=n' if n in right else ''}>{value}</{tag}>" for n, value in enumerate(values))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells("th", [escape(one) for one in head])}</tr>{body}</table></div>'


def figure(svg: str, caption: str, key: str = "") -> str:
    """A chart with its caption (HTML) and a legend."""
    return f"<figure>{svg}<figcaption>{caption}{'<br>' + key if key else ''}</figcaption></figure>"
