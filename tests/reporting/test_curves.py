"""Charts: points where they belong, axes that hold them, no number that is none, and valid SVG."""

from __future__ import annotations

import math
import xml.etree.ElementTree as xml

import pytest

from postil.reporting.curves import HEIGHT, WIDTH, Line, chart, interval, legend, smooth, standalone

Tag = "{http://www.w3.org/2000/svg}"


def points(svg: str) -> list[list[tuple[float, float]]]:
    """The coordinates of every polyline."""
    return [
        [tuple(float(n) for n in pair.split(",")) for pair in line.attrib["points"].split()]  # type: ignore[misc]
        for line in xml.fromstring(svg).iter("polyline")
    ]


def test_a_line_runs_over_the_axes() -> None:
    ((first, middle, last),) = points(chart([Line("a", [(0, 0), (5, 1), (10, 2)])], "a", x_text="ten"))
    assert first[0] < middle[0] < last[0] < WIDTH
    assert HEIGHT > first[1] > middle[1] > last[1] > 0
    assert middle[0] == pytest.approx((first[0] + last[0]) / 2)
    assert middle[1] == pytest.approx((first[1] + last[1]) / 2)


def test_decades_are_equally_far_apart_on_a_logarithmic_axis() -> None:
    ((a, b, c),) = points(chart([Line("a", [(1, 0.01), (2, 0.1), (3, 1.0)])], "a", log=True))
    assert b[1] - a[1] == pytest.approx(c[1] - b[1])


@pytest.mark.parametrize("log", [False, True])
def test_what_is_no_number_is_left_out(log: bool) -> None:
    svg = chart([Line("a", [(1, math.nan), (2, 3.0), (3, math.inf), (4, 5.0)], [(0, math.nan)])], "a", log=log)
    assert len(points(svg)[0]) == 2
    assert "nan" not in svg
    assert "inf" not in svg


def test_a_constant_and_a_single_point_are_drawn() -> None:
    for values in ([(1.0, 2.0)], [(1.0, 2.0), (2.0, 2.0)], [(1.0, 0.0)], [(1.0, 0.0), (2.0, 0.0)]):
        for settings in ({}, {"zero": False}, {"log": True}):
            xml.fromstring(chart([Line("a", values)], "a", **settings))


def test_nothing_says_so() -> None:
    assert "nothing to draw" in chart([], "a")
    assert "nothing to draw" in chart([Line("a", [(1, 0.0)])], "a", log=True)


def test_words_are_escaped() -> None:
    svg = chart([Line("a", [(1, 1)])], '<b>"x"', x_text="<i>")
    assert "<b>" not in svg
    assert "<i>" not in svg
    assert "&lt;x&gt;" in legend([Line("<x>", ())])


def test_charts_side_by_side_are_one_file() -> None:
    lines = [Line("named <here>", [(1, 1), (2, 2)])]
    svg = standalone([("one & <two>", chart(lines, "a"), lines), ("b", chart([], "b"), ())])
    root = xml.fromstring(svg)
    assert root.tag == f"{Tag}svg"
    assert len(list(root.iter(f"{Tag}polyline"))) == 1
    assert "one & <two>" in "".join(root.itertext())
    assert "named <here>" in "".join(root.itertext())
    assert "var(" not in svg  # no page gives it a colour


def test_an_interval_stands_beside_zero() -> None:
    root = xml.fromstring(interval(0.1, 0.2, 0.3, 1.0, up=True))
    zero, line = root.iter("line")
    assert float(line.attrib["x1"]) > float(zero.attrib["x1"])
    assert float(line.attrib["x2"]) > float(line.attrib["x1"])
    left = xml.fromstring(interval(-9.0, -2.0, -0.1, 1.0, up=False))
    assert float(next(left.iter("circle")).attrib["cx"]) == pytest.approx(4)  # what is beyond stays at the edge
    assert "left is better" in left.attrib["aria-label"]


def test_smoothing() -> None:
    assert smooth([]) == []
    assert smooth([2.0, 2.0]) == [2.0, 2.0]
    assert smooth([0.0, 1.0], 0.5) == [0.0, 0.5]
