"""Charts are well-formed SVG with the numbers in the right places, whatever they are given."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rm_scale.reporting.bar_charts import Bar, bars, grouped, stacked
from rm_scale.reporting.chart_parts import Axis, standalone
from rm_scale.reporting.chart_scales import log_ticks, ticks
from rm_scale.reporting.charts import Series, histogram, lines

NAN = math.nan


def parsed(chart: str) -> ET.Element:
    return ET.fromstring(chart.replace("…", "..."))


def texts(chart: str) -> list[str]:
    return ["".join(element.itertext()) for element in parsed(chart).iter() if element.tag.endswith("text")]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0, 47, [0, 10, 20, 30, 40]),
        (-3, 3, [-2, 0, 2]),
        (5, 5, [5]),
        (0.1, 0.13, [0.1, 0.11, 0.12, 0.13]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_log_ticks() -> None:
    assert log_ticks(1, 100) == [1, 2, 5, 10, 20, 50, 100]
    assert log_ticks(1, 1e6) == [1, 10, 100, 1000, 1e4, 1e5, 1e6]


def test_a_line_goes_through_its_points_and_breaks_where_one_is_missing() -> None:
    chart = lines("loss", [Series("a", [0, 1, 2, 3, 4], [0, 1, None, 1, 0])], Axis("step"), Axis("loss", 0, 1))
    path = next(element for element in parsed(chart).iter() if element.tag.endswith("path"))
    points = re.findall(r"([ML])([\d.]+) ([\d.]+)", path.attrib["d"])
    assert [pen for pen, _, _ in points] == ["M", "L", "M", "L"]
    (_, x0, y0), (_, x1, y1), (_, x3, _), _ = points
    assert float(y0) > float(y1), "more is further up"
    assert float(x3) - float(x0) == pytest.approx(3 * (float(x1) - float(x0)), abs=0.3)


def test_a_point_without_a_neighbour_is_a_dot() -> None:
    """A legend must not name a line that nobody can see: one evaluation has one point."""
    chart = lines("loss", [Series("a", [1, 2], [1, 2]), Series("held-out", [2], [1.5])], Axis("step"), Axis("loss"))
    drawn = [element for element in parsed(chart).iter() if element.tag.endswith("circle")]
    assert [element.attrib["fill"] for element in drawn if "fill" in element.attrib] == ["var(--series-2)"]
    assert sum(element.tag.endswith("path") for element in parsed(chart).iter()) == 1


def test_bands_marks_and_a_legend() -> None:
    chart = lines(
        "t",
        [
            Series("a", [1, 2], [1, 2], [0, 1], [2, 3]),
            Series("b", [1, 2], [2, 1], marks=True),
            Series("c", [1], [1], [0], [2], marks=True),
        ],
        Axis("x", log=True),
        Axis("y"),
    )
    tags = [element.tag.rpartition("}")[2] for element in parsed(chart).iter()]
    assert tags.count("polygon") == 1
    seen = [e.get("fill-opacity") is None for e in parsed(chart).iter() if e.tag.endswith("circle")]
    assert seen.count(True) == 3 and seen.count(False) == 2, "points, and what can be pointed at on the line"
    assert {"a", "b", "c", "x", "y"} <= set(texts(chart))


def test_bars_with_intervals_and_a_reference() -> None:
    chart = bars(
        "accuracy",
        [Bar("one", 0.5, 0.4, 0.6), Bar("two", None), Bar("x" * 80, 1.0, note="best")],
        Axis("share", 0, 1, percent=True),
        reference=0.7,
    )
    shown = texts(chart)
    assert {"50%", "no data", "100% best", "share"} <= set(shown) and any(text.endswith("...") for text in shown)
    rects = [element for element in parsed(chart).iter() if element.tag.endswith("rect")]
    assert float(rects[1].attrib["width"]) == pytest.approx(2 * float(rects[0].attrib["width"]), abs=0.2)
    assert 'class="ref"' in chart


def test_histogram_heights_are_counts() -> None:
    chart = histogram("margins", [-1, 0, 1], [5, 10], Axis("margin"), split_at=0.0)
    rects = [element for element in parsed(chart).iter() if element.tag.endswith("rect")]
    heights = [float(rect.attrib["height"]) for rect in rects]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert rects[0].attrib["fill"] != rects[1].attrib["fill"]


def test_stacked_parts_add_up() -> None:
    chart = stacked("memory", ["a", "b"], [("weights", [1, 2]), ("rest", [3, None])], Axis("GB", high=8))
    rects = [r for r in parsed(chart).iter() if r.tag.endswith("rect") and r.attrib["height"] == "17"]
    widths = [float(rect.attrib["width"]) for rect in rects]
    assert widths[1] == pytest.approx(3 * widths[0], abs=0.3) and widths[3] == 0
    assert float(rects[1].attrib["x"]) == pytest.approx(float(rects[0].attrib["x"]) + widths[0], abs=0.2)
    assert {"weights", "rest", "GB"} <= set(texts(chart)) and 'class="ref"' in chart


def test_nothing_to_draw_says_so() -> None:
    x = Axis()
    for chart in (
        lines("t", [], x, x),
        lines("t", [Series("a", [1], [NAN])], x, x),
        histogram("t", [], [], x),
        histogram("t", [0, 1], [0], x),
        bars("t", [Bar("a", None)], x),
        stacked("t", [], [], x),
        stacked("t", ["a"], [("p", [0])], x),
    ):
        assert chart == '<p class="nothing">t: no data.</p>'


def test_names_are_escaped() -> None:
    evil = '<script>alert("x")</script>&'
    for chart in (
        grouped(evil, [evil], [(evil, [Bar(evil, 1.0, note=evil)])], Axis(evil)),
        standalone(lines("t", [Series("b", [1], [1])], Axis(), Axis()), evil),
        lines(evil, [Series(evil, [1, 2], [1, 2]), Series("b", [1], [1])], Axis(evil), Axis(evil)),
        bars(evil, [Bar(evil, 1.0, note=evil)], Axis(evil)),
        stacked(evil, [evil], [(evil, [1])], Axis(evil)),
        histogram(evil, [0, 1], [1], Axis(evil)),
        bars(evil, [], Axis()),
    ):
        assert "<script" not in chart
        parsed(chart)


def tips(chart: str) -> list[str]:
    found = [e for e in parsed(chart).iter() if e.tag.rpartition("}")[2] in {"circle", "rect"} and len(e)]
    return ["".join(element.itertext()) for element in found]


def test_points_and_bars_tell_their_value() -> None:
    assert tips(lines("t", [Series("loss", [1, 2, 3], [0.5, None, 0.25])], Axis(), Axis())) == [
        "loss 1: 0.5",
        "loss 3: 0.25",
    ]
    assert tips(lines("t", [Series("seen", [1], [2], marks=True)], Axis(), Axis())) == ["seen 1: 2"]
    many = list(range(500))
    assert tips(lines("t", [Series("loss", many, many)], Axis(), Axis())) == [], "a long curve stays small"
    assert tips(bars("t", [Bar("a", 0.5), Bar("b", None)], Axis(percent=True))) == ["a: 50%"]
    assert tips(stacked("t", ["run"], [("weights", [2.0])], Axis())) == ["run, weights: 2"]


def test_bars_in_groups() -> None:
    ours = [Bar("rm_scale", 3.0, note="(3.0 ×)"), Bar("rm_scale", None, note="out of memory")]
    parts = [("TRL", [Bar("TRL", 1.0), Bar("TRL", 0.5)]), ("rm_scale", ours)]
    chart = grouped("pairs/s", ["full", "lora"], parts, Axis("pairs/s"), colours=[5, 0])
    assert tips(chart) == ["TRL: 1", "rm_scale: 3 (3.0 ×)", "TRL: 0.5"]
    assert {"full", "lora", "3 (3.0 ×)", "out of memory", "TRL", "rm_scale", "pairs/s"} <= set(texts(chart))
    drawn = [e for e in parsed(chart).iter() if e.tag.endswith("rect") and len(e)]
    widths = [float(element.attrib["width"]) for element in drawn]
    assert widths[1] == pytest.approx(3 * widths[0], abs=0.2) and widths[2] == pytest.approx(widths[0] / 2, abs=0.2)
    assert [element.attrib["fill"] for element in drawn] == [f"var(--series-{n})" for n in (6, 1, 6)]
    assert "no data" in grouped("t", [], [], Axis()) and "no data" in grouped(
        "t", ["a"], [("b", [Bar("b", 0)])], Axis()
    )


def test_a_chart_as_a_file_brings_its_colours_and_its_background() -> None:
    chart = grouped("t", ["full"], [("TRL", [Bar("TRL", 1.0)])], Axis("pairs/s"))
    root = parsed(standalone(chart, "What <it> shows"))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert (width, height) == (float(root.attrib["width"]), float(root.attrib["height"]))
    text = standalone(chart, "What <it> shows")
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used and all(f"{name}:" in text for name in used), "no colour of a page is missing"
    assert "prefers-color-scheme:dark" in text and 'fill="var(--back)"' in text
    assert "What <it> shows" in texts(text)


@pytest.mark.parametrize(
    "values", [[5e-324, 5e-324], [0.0, 5e-324], [1e-310, 2e-310], [1.0, 1.0 + 2e-16], [-1e308, 1e308], [-1e280, 1e280]]
)
@pytest.mark.parametrize("log", [False, True])
def test_numbers_at_the_ends_of_what_floats_can_hold(values: list[float], log: bool) -> None:
    chart = lines("t", [Series("s", values, [1.0, 2.0])], Axis("x", log=log), Axis("y", log=log))
    assert chart == '<p class="nothing">t: no data.</p>' or parsed(chart) is not None
    parsed(lines("t", [Series("s", [1.0, 2.0], values)], Axis("x"), Axis("y")))


numbers = st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True, width=32))


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), numbers, numbers, numbers), max_size=8), st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_numbers_make_a_chart(
    rows: list[tuple[float, float | None, float | None, float | None]], log: bool, marks: bool
) -> None:
    x, y, low, high = ([row[place] for row in rows] for place in range(4))
    series = Series("s", x, y, low, high, marks=marks)
    parsed(lines("t", [series], Axis("x", log=log), Axis("y", log=log)))
    parsed(bars("t", [Bar("b", value, one, other) for value, one, other in zip(y, low, high, strict=True)], Axis("v")))
    parsed(histogram("t", sorted(x), [abs(v) if v is not None else None for v in y[1:]], Axis("x")))
