"""Pages stand alone, escape what they are given, and show every part of an evaluation."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rm_scale.reporting.page import Mark, Page, interval, number
from rm_scale.reporting.style import SORTING


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(html: str) -> None:
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    sorting = f"<script>{SORTING}</script>"
    assert html.count(sorting) == ('class="sortable"' in html), "our script, once, and only where there is a use for it"
    plain = html.replace(sorting, "").replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"(src|href)\s*=|url\(|@import|<script", plain)
    assert not re.search(r"fetch|XMLHttpRequest|import|http|innerHTML|eval", SORTING), "nothing from the network"
    assert 'name="viewport"' in html and "prefers-color-scheme:dark" in html


def test_a_page_stands_alone(tmp_path: Path) -> None:
    page = Page("A <b>title</b>", refresh_seconds=5)
    page.section("One & two")
    page.heading("h")
    page.paragraph("words <i>", kind="predicted")
    page.tiles([("1", "name", "note <x>")])
    page.table(["a", "b"], [("x <y>", 1.5), ("z", Mark("bad <!>", False)), ("n", None)])
    page.figures([("<svg></svg>", "caption <c>")])
    page.code("rm-scale eval < x")
    page.details("more", ["a"], [(1,)])
    page.provenance({"version": "1"})
    path = page.write(tmp_path / "page.html")
    html = path.read_text()
    check_page(html)
    for escaped in ("A &lt;b&gt;title", "words &lt;i&gt;", "note &lt;x&gt;", "bad &lt;!&gt;", "caption &lt;c&gt;"):
        assert escaped in html
    assert '<span class="kind predicted">predicted</span>' in html and '<td class="bad">' in html
    assert 'http-equiv="refresh" content="5"' in html and [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_sortable_tables_are_plain_ones_without_the_script() -> None:
    page = Page("t")
    page.details("all", ["case", "pairs/s"], [("a", 1.5), ("b", None)], sortable=True)
    page.table(["x"], [(1,)])
    html = page.html()
    check_page(html)
    rows = "<tr><td>a</td><td>1.5</td></tr><tr><td>b</td><td>–</td></tr>"
    assert f'<table class="sortable"><thead><tr><th>case</th><th>pairs/s</th></tr></thead><tbody>{rows}' in html
    assert html.index("</table>") < html.index("<script>"), "the tables are there when it runs"
    assert "<script" not in Page("none").html()


def test_what_is_folded_and_what_stands_side_by_side() -> None:
    page = Page("t")
    with page.folded("more <i>"):
        page.paragraph("inside")
    with page.side_by_side("answer"):
        page.figure("<svg></svg>")
    html = page.html()
    check_page(html)
    assert "<details><summary>more &lt;i&gt;</summary><p>inside</p></details>" in html
    assert '<div class="answer"><figure><svg></svg></figure></div>' in html


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (1e-5, "1e-05"),
        (0.0, "0"),
        (12345.678, "12,346"),
        (True, "True"),
        ("<a>", "&lt;a&gt;"),
    ],
)
def test_numbers_for_people(value: object, shown: str) -> None:
    assert number(value) == shown


def test_intervals() -> None:
    assert interval([0.1, 0.25]) == "0.1 – 0.25" and interval(None) == "–" and interval([None, 1.0]) == "– – 1"
