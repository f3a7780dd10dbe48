"""One self-contained HTML page: nothing from elsewhere, light and dark, readable on a phone and on paper.

A page with sortable tables holds one short script of ours (`style.SORTING`), and reads as well without it; all other
pages hold none.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rm_scale.files import write_whole
from rm_scale.output_paths import PAGE_MARK
from rm_scale.reporting.style import PAGE, SORTING
from rm_scale.texts import printable

Kind = Literal["measured", "predicted", "quoted"]


def text(value: Any) -> str:
    """Return a value as it may stand in HTML."""
    return html.escape(printable(str(value)), quote=True)


def number(value: Any, digits: int = 4) -> str:
    """Return a number for people; a dash where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def interval(ends: Any, digits: int = 4) -> str:
    """Return both ends of an interval; a dash for what is no list of two."""
    if not isinstance(ends, list | tuple) or len(ends) != 2:
        return "–"
    return f"{number(ends[0], digits)} – {number(ends[1], digits)}"


@dataclass
class Page:
    """A page that grows from top to bottom. All text is escaped; only `figure` takes markup, from charts.py.

    Attributes:
        title: its heading, and its name in a browser.
        refresh_seconds: how often the page loads itself again; `None`: never.
    """

    title: str
    refresh_seconds: int | None = None
    _parts: list[str] = field(default_factory=list)
    _is_sortable: bool = False

    def section(self, title: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{text(title)}</h2>")

    def heading(self, title: str) -> None:
        """Begin a part of a section."""
        self._parts.append(f"<h3>{text(title)}</h3>")

    def paragraph(self, content: str, kind: Kind | None = None, faint: bool = False) -> None:
        """Add a paragraph; `kind` says whether its figures were measured, predicted or quoted."""
        mark = f' <span class="kind {kind}">{kind}</span>' if kind else ""
        self._parts.append(f"<p{' class=faint' if faint else ''}>{text(content)}{mark}</p>")

    def warnings(self, found: Sequence[tuple[str | None, str]]) -> None:
        """Add warnings: a name, where there is one, and a text each."""
        items = [f"<li>{f'<b>{text(name)}</b> ' if name else ''}{text(said)}</li>" for name, said in found]
        self._parts.append(f'<ul class="warnings">{"".join(items)}</ul>')

    def tiles(self, values: Sequence[tuple[str, str, str]]) -> None:
        """Add key numbers: value, name, and a note each."""
        tiles = [
            f'<div class="tile"><b>{text(value)}</b>{text(name)}<br><span>{text(note)}</span></div>'
            for value, name, note in values
        ]
        self._parts.append(f'<div class="tiles">{"".join(tiles)}</div>')

    def table(
        self, header: Sequence[str], rows: Sequence[Sequence[Any]], digits: int = 4, sortable: bool = False
    ) -> None:
        """Add a table; numbers are formatted, everything else is text. `Mark`s are coloured.

        Args:
            header: of the columns.
            rows: as many cells each.
            digits: of numbers.
            sortable: by a click on a header, and with a field that filters; the page then holds a script.
        """
        self._is_sortable |= sortable
        head = "".join(f"<th>{text(name)}</th>" for name in header)
        body = "".join("<tr>" + "".join(_cell(value, digits) for value in row) + "</tr>" for row in rows)
        kind = ' class="sortable"' if sortable else ""
        self._parts.append(
            f'<div class="wide"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def figure(self, chart: str, caption: str = "") -> None:
        """Add a chart of charts.py, with a caption."""
        below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
        self._parts.append(f"<figure>{chart}{below}</figure>")

    def figures(self, charts: Sequence[tuple[str, str]]) -> None:
        """Add charts side by side where the page is wide enough: chart and caption each."""
        with self.side_by_side():
            for chart, caption in charts:
                self.figure(chart, caption)

    def code(self, content: str) -> None:
        """Add a command or a file's content."""
        self._parts.append(f"<pre><code>{text(content)}</code></pre>")

    def details(
        self,
        summary: str,
        header: Sequence[str],
        rows: Sequence[Sequence[Any]],
        digits: int = 4,
        sortable: bool = False,
    ) -> None:
        """Add a table that is folded away; arguments as those of `table`."""
        with self.folded(summary):
            self.table(header, rows, digits, sortable)

    @contextmanager
    def folded(self, summary: str) -> Iterator[None]:
        """Fold away what is added in a `with` block; `summary` is shown."""
        self._parts.append(f"<details><summary>{text(summary)}</summary>")
        yield
        self._parts.append("</details>")

    @contextmanager
    def side_by_side(self, kind: Literal["two", "answer"] = "two") -> Iterator[None]:
        """Put what is added in a `with` block into two columns where the page is wide enough.

        Args:
            kind: two: charts; answer: a chart and a small table.
        """
        self._parts.append(f'<div class="{kind}">')
        yield
        self._parts.append("</div>")

    def provenance(self, facts: Mapping[str, Any]) -> None:
        """Add a section that says where the numbers are from."""
        self.section("Where this comes from")
        self.table(["", ""], [(name, value) for name, value in facts.items()])

    def html(self) -> str:
        """Return the whole page."""
        refresh = f'<meta http-equiv="refresh" content="{self.refresh_seconds}">' if self.refresh_seconds else ""
        script = f"<script>{SORTING}</script>" if self._is_sortable else ""
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8">{PAGE_MARK}'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<meta name="color-scheme" content="light dark">{refresh}<title>{text(self.title)}</title>'
            f"<style>{PAGE}</style></head><body><h1>{text(self.title)}</h1>{''.join(self._parts)}"
            f"{script}</body></html>\n"
        )

    def write(self, path: Path) -> Path:
        """Write the page, whole or not at all; return the path."""
        return write_whole(path, self.html())


@dataclass(frozen=True)
class Mark:
    """A text in a table that is good or bad."""

    content: str
    good: bool


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, Mark):
        return f'<td class="{"good" if value.good else "bad"}">{text(value.content)}</td>'
    return f"<td>{number(value, digits)}</td>"
