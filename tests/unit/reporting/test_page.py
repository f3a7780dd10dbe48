"""Pages stand alone, escape what they are given, and show every part of an evaluation."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rm_scale.reporting.page import Mark, Page, interval, number


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
    assert not re.search(r"(src|href)\s*=|url\(|@import|<script", html.replace("http://www.w3.org/2000/svg", ""))
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
