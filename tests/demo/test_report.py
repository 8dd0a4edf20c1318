"""The demo's page and picture: whole in themselves, telling what was done, and what models wrote is escaped."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as xml
from collections.abc import Callable
from pathlib import Path

import pytest

from postil.demo.report import picture, write_page
from postil.demo.run import Demo
from postil.demo.service import Served
from postil.demo.teams import CUT, TEAMS
from postil.demo.work import Plan
from postil.registry.version import short

NASTY = "<script>alert('x')</script> & \"quoted\""


@pytest.fixture
def plan(demo: Demo, plan_in: Callable[[Path], Plan]) -> Plan:
    return plan_in(demo.report.parent)


def page(demo: Demo, plan: Plan, tmp_path: Path) -> str:
    there = dataclasses.replace(demo, report=tmp_path / "report.html")
    write_page(there, plan)
    return there.report.read_text(encoding="utf-8")


def test_the_page_is_whole_in_itself(demo: Demo) -> None:
    text = demo.report.read_text(encoding="utf-8")
    assert not re.search(r"https?:|src=|href=|@import|url\(|<link|<script", text)
    for opened in ("table", "figure", "svg", "div", "tr", "td", "details"):
        assert len(re.findall(rf"<{opened}\b", text)) == text.count(f"</{opened}>"), opened


def test_the_page_tells_what_was_done(demo: Demo, plan: Plan, tmp_path: Path) -> None:
    text = page(demo, plan, tmp_path)
    for team in TEAMS:
        assert f"<code>{short(demo.service.live[team.name].version)}</code>" in text
        assert f"<h2>{team.name}</h2>" in text  # its run's own report follows
    for said in (
        "the registry's policy let them into service", f"{demo.service.requests} requests", "equal, bit for bit",
        "3 of 3 word for word", "<td>rollback</td>", "<td>promote</td>", "Answers beside the base's",
    ):  # fmt: skip
        assert said in text, said
    refused = dataclasses.replace(demo.teams[0], refused="refused: <b>worse</b>")
    bad = dataclasses.replace(demo, teams=[refused, *demo.teams[1:]], digests=demo.digests | {"x"})
    bad.service.refused["restaurants (cut)"] = "refused: too little of it left"
    text = page(bad, plan, tmp_path)
    bad.service.refused.clear()
    for said in (
        "Not every note was let into service",
        "they differ",
        "refused: &lt;b&gt;worse",
        "too little of it left",
    ):
        assert said in text, said


def test_what_a_model_wrote_is_escaped(demo: Demo, plan: Plan, tmp_path: Path) -> None:
    nasty = Served("v", tuple(NASTY for _ in demo.service.live[CUT].answers))
    told = dataclasses.replace(demo, service=dataclasses.replace(demo.service, back=nasty))
    text = page(told, plan, tmp_path)
    assert "<script" not in text
    assert "&lt;script&gt;alert(" in text


def test_without_a_roll_back_the_page_says_so(demo: Demo, plan: Plan, tmp_path: Path) -> None:
    told = dataclasses.replace(demo, service=dataclasses.replace(demo.service, back=None))
    assert "It was not rolled back" in page(told, plan, tmp_path)


def test_the_picture_is_one_svg(demo: Demo, plan: Plan) -> None:
    text = picture(demo, plan)
    assert text.count("http") == 1  # the name space alone
    root = xml.fromstring(text)
    lines = root.findall(".//{*}polyline")
    assert len(lines) == 3
    assert len(lines[0].attrib["points"].split()) == 2  # a step each
    assert "restaurants: BLEU " in "".join(root.itertext())
