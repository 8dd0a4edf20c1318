"""The demo's report and picture of a hand-made result: whole in themselves, and what users wrote is escaped."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from postil.demo import Demo
from postil.demo.report import picture, write_report
from postil.demo.run import UNFINISHED, TeamResult, summary
from postil.demo.teams import Team, bleu
from postil.judging.card.model import Estimate

FACTS = {"name": "a <b>base</b>", "parameters": "134.5 M", "fingerprint": "sha256:00"}
NASTY = "<script>alert('x')</script> & \"quoted\""


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    results = []
    for name in ("one", "two", "three"):
        team = Team(name, f"Team {name} & <co>", "BLEU < 100", 1e-3, bleu, 8)
        results.append(
            TeamResult(
                team, 12.0, 304, base_score=3.0, score=41.5, base_loss=2.5, loss=1.25,
                gain=Estimate(value=1.2, low=1.1, high=1.3), general=3.05,
                curve=[(1, 3.0), (2, 2.0), (3, 1.5)], answers=[(NASTY, "wanted", "bare", NASTY)],
            )
        )  # fmt: skip
    return Demo(
        teams=results, base_general=3.0, general_tokens=8192, digest_before="sha256:" + "a" * 64,
        digest_after="sha256:" + "a" * 64, seconds=300.0, adapter_bytes=1_900_000, batch_rows=288, batch_seconds=40.0,
        report=tmp_path / "report.html",
    )  # fmt: skip


def page(demo: Demo) -> str:
    write_report(demo, FACTS)
    return demo.report.read_text(encoding="utf-8")


def test_the_page_is_whole_in_itself(demo: Demo) -> None:
    text = page(demo)
    assert not re.search(r"https?:|src=|href=|@import|url\(|<link|<script", text)
    assert text.startswith("<!doctype html>")
    for opened in ("table", "figure", "svg", "div", "tr", "td"):
        assert text.count(f"<{opened}") == text.count(f"</{opened}>"), opened
    assert text.count("<svg") == 3


def test_the_page_tells_the_figures(demo: Demo) -> None:
    text = page(demo)
    for said in ("41.5", "1.25", "+1.10 to +1.30", "+0.050", "8,192 tokens", "288 requests", "equal, bit for bit"):
        assert said in text
    assert "All three notes are better than the bare base" in text
    assert text.count("<td>better</td>") == 3
    worse = dataclasses.replace(demo.teams[0], gain=Estimate(value=0.1, low=-0.1, high=0.3))
    bad = dataclasses.replace(demo, teams=[worse, *demo.teams[1:]], digest_after="sha256:" + "b" * 64)
    assert (demo.good, bad.good) == (True, False)
    text = page(bad)
    assert "Not every note is measurably better" in text
    assert "they differ" in text
    assert text.count("<td>no evidence</td>") == 1


def test_what_a_model_or_user_wrote_is_escaped(demo: Demo) -> None:
    text = page(demo)
    assert "alert(" in text
    assert "<script" not in text
    assert "&lt;script&gt;alert(" in text
    assert "a &lt;b&gt;base&lt;/b&gt;" in text
    assert "Team one &amp; &lt;co&gt;" in text


def test_the_picture_is_one_svg(demo: Demo) -> None:
    text = picture(demo)
    assert text.count("http") == 1  # the name space alone
    root = xml.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    lines = root.findall(".//{*}polyline")
    assert len(lines) == 3
    assert len(lines[0].attrib["points"].split()) == 3
    assert "one: BLEU < 100 3 → 42" in "".join(root.itertext())


def test_the_summary_is_known_as_a_demo(demo: Demo) -> None:
    found = summary(demo)
    assert UNFINISHED.keys() <= found.keys()
    assert found["good"] is True
    assert found["teams"]["two"]["gain_interval"] == [1.1, 1.3]
