"""The picture of gain against damage: each run of a set as a cross of its two 95% intervals."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT, LEFT, EDGE, FOOT = 720, 420, 56, 12, 44
COLOURS = {"guard": "#a3341f", "qlora": "#b8860b", "lora": "#3f7fbf", "full": "#4e9a51"}  # by how a name begins


def picture(folder: Path) -> str:
    """SVG of the set's runs that have a result: general nats lost per token along, the target's gain up."""
    points = []
    for path in sorted(folder.glob("*.json")):
        card = json.loads(path.read_text(encoding="utf-8")).get("card")
        if card is None:  # refused by its guard
            continue
        gain, loss = (
            part["measures"][part["main"]]["difference"] for part in (card["target"], card["general"]["nats"])
        )
        points.append((path.stem, loss, gain, card["target"]["main"]))
    if not points:
        return ""
    across = [end for _, loss, _, _ in points for end in (loss["low"], loss["high"], 0.0)]
    up = [end for _, _, gain, _ in points for end in (gain["low"], gain["high"])]
    left, right, low, high = (f(ends) for ends in (across, up) for f in (min, max))

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - EDGE) * (value - left) / ((right - left) or 1)

    def y(value: float) -> float:
        return EDGE + (HEIGHT - FOOT - EDGE) * (high - value) / ((high - low) or 1)

    parts = list[str]()
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(_text(LEFT - 8, y(low + share * (high - low)) + 4, f"{low + share * (high - low):+.1f}", "end"))
        parts.append(
            _text(x(left + share * (right - left)), HEIGHT - FOOT + 18, f"{left + share * (right - left):+.2f}")
        )
    parts.append(
        f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{EDGE}" y2="{HEIGHT - FOOT}" stroke="#333" opacity=".3"/>'
    )
    for name, loss, gain, _ in points:
        parts.append(_cross(name, x, y, loss, gain))
    metric = points[0][3]
    parts.append(_text(WIDTH - EDGE, HEIGHT - 6, "general nats per token, over the base's: left is better", "end"))
    parts.append(_text(LEFT, HEIGHT - 6, f"{metric} over the base's: up is better", "start"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="Georgia, \'Times New Roman\', serif" style="background:#fdfcf8" '
        f'aria-label="Gain against damage, {escape(folder.name)}">{"".join(parts)}</svg>\n'
    )


def _cross(name: str, x: Any, y: Any, loss: dict[str, float], gain: dict[str, float]) -> str:
    colour = next((shade for start, shade in COLOURS.items() if name.startswith(start)), "#708090")
    at, height = x(loss["value"]), y(gain["value"])
    line = f'stroke="{colour}" stroke-width="1.5" opacity=".7"'
    anchor, beside = ("end", -8) if at > WIDTH * 0.7 else ("start", 8)
    return (
        f'<line x1="{x(loss["low"]):.1f}" x2="{x(loss["high"]):.1f}" y1="{height:.1f}" y2="{height:.1f}" {line}/>'
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y(gain["low"]):.1f}" y2="{y(gain["high"]):.1f}" {line}/>'
        f'<circle cx="{at:.1f}" cy="{height:.1f}" r="4" fill="{colour}"/>'
        f'<text x="{at + beside:.1f}" y="{height - 7:.1f}" font-size="12" text-anchor="{anchor}" fill="{colour}">'
        f"{escape(name)}</text>"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" text-anchor="{anchor}" fill="#333">{escape(text)}</text>'
