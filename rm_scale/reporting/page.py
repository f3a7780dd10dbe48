"""One self-contained HTML page: no script, nothing from elsewhere, light and dark, readable on a phone and on paper."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["measured", "predicted", "quoted"]

_STYLE = """
:root{--back:#fff;--fore:#1c1e21;--faint:#5c636b;--line:#d9dde2;--card:#f5f6f8;--good:#1a7f37;--bad:#b3261e;
--series-1:#2f6fb5;--series-2:#c4572b;--series-3:#3c8c57;--series-4:#8a5ab5;--series-5:#b08a12;--series-6:#5d7380}
@media (prefers-color-scheme:dark){:root{--back:#15171a;--fore:#e6e8ea;--faint:#9aa3ad;--line:#353b42;--card:#1f2328;
--good:#56d364;--bad:#ff8a80;--series-1:#6ea8e6;--series-2:#f0936b;--series-3:#74c690;--series-4:#bd95e6;--series-5:#dcb84a;
--series-6:#9fb4c0}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem;max-width:74rem;background:var(--back);color:var(--fore);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.6rem;margin:.2rem 0 .6rem}h2{font-size:1.2rem;margin:2rem 0 .6rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.2rem 0 .4rem}p{margin:.4rem 0;max-width:56rem}code{font-size:.9em;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.6rem .8rem}
.tile b{display:block;font-size:1.45rem;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span,.faint,figcaption,.nothing{color:var(--faint);font-size:.87rem}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:10rem}pre{white-space:pre-wrap;
overflow-wrap:anywhere;background:var(--card);border-radius:.5rem;padding:.6rem .8rem}
figure{margin:1rem 0}.chart{width:100%;height:auto;display:block}.chart text{font-size:11px;fill:currentColor}
.chart .faint{fill:var(--faint)}.chart .grid{stroke:var(--line);stroke-width:1}
.chart .ref{stroke:currentColor;stroke-width:1.5;stroke-dasharray:4 3}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:0 1.4rem}
.kind{border:1px solid var(--line);border-radius:.3rem;padding:0 .35rem;font-size:.75rem;color:var(--faint);
vertical-align:middle;white-space:nowrap}
.kind.predicted{border-style:dashed}.good{color:var(--good)}.bad{color:var(--bad)}
details{margin:.6rem 0}summary{cursor:pointer}
@media (max-width:40rem){.chart text{font-size:15px}}
@media print{body{max-width:none}details{display:block}}
"""


def text(value: Any) -> str:
    """As it may stand in HTML."""
    return html.escape(str(value), quote=True)


def number(value: Any, digits: int = 4) -> str:
    """A number for people; a dash where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text(value)
    if isinstance(value, int):
        return f"{value:,}"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def interval(ends: Sequence[float | None] | None, digits: int = 4) -> str:
    """Both ends of an interval."""
    return "–" if not ends else f"{number(ends[0], digits)} – {number(ends[1], digits)}"


@dataclass
class Page:
    """A page that grows from top to bottom. All text is escaped; only `figure` takes markup, from charts.py.

    Attributes:
        title: of the page.
        refresh_seconds: the page loads itself again so often; `None`: never.
    """

    title: str
    refresh_seconds: int | None = None
    _parts: list[str] = field(default_factory=list)

    def section(self, title: str) -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{text(title)}</h2>")

    def heading(self, title: str) -> None:
        """Begin a part of a section."""
        self._parts.append(f"<h3>{text(title)}</h3>")

    def paragraph(self, words: str, kind: Kind | None = None, faint: bool = False) -> None:
        """A paragraph; `kind` says whether its figures were measured, predicted or quoted."""
        mark = f' <span class="kind {kind}">{kind}</span>' if kind else ""
        self._parts.append(f"<p{' class=faint' if faint else ''}>{text(words)}{mark}</p>")

    def tiles(self, values: Sequence[tuple[str, str, str]]) -> None:
        """Key numbers: value, name, and a note."""
        tiles = [
            f'<div class="tile"><b>{text(value)}</b>{text(name)}<br><span>{text(note)}</span></div>'
            for value, name, note in values
        ]
        self._parts.append(f'<div class="tiles">{"".join(tiles)}</div>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]], digits: int = 4) -> None:
        """A table; numbers are formatted, everything else is text. `Mark`s are coloured."""
        head = "".join(f"<th>{text(name)}</th>" for name in header)
        body = "".join("<tr>" + "".join(_cell(value, digits) for value in row) + "</tr>" for row in rows)
        self._parts.append(
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def figure(self, chart: str, caption: str = "") -> None:
        """A chart of charts.py, with a caption."""
        below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
        self._parts.append(f"<figure>{chart}{below}</figure>")

    def figures(self, charts: Sequence[tuple[str, str]]) -> None:
        """Charts side by side where there is room: chart and caption each."""
        inside = "".join(
            f"<figure>{chart}<figcaption>{text(caption)}</figcaption></figure>" for chart, caption in charts
        )
        self._parts.append(f'<div class="two">{inside}</div>')

    def code(self, words: str) -> None:
        """A command or a file's content."""
        self._parts.append(f"<pre><code>{text(words)}</code></pre>")

    def details(self, summary: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table that is folded away."""
        inner = Page("")
        inner.table(header, rows)
        self._parts.append(f"<details><summary>{text(summary)}</summary>{''.join(inner._parts)}</details>")

    def provenance(self, facts: Mapping[str, Any]) -> None:
        """Where the numbers are from."""
        self.section("Where this comes from")
        self.table(["", ""], [(name, value) for name, value in facts.items()])

    def html(self) -> str:
        """The whole page."""
        refresh = f'<meta http-equiv="refresh" content="{self.refresh_seconds}">' if self.refresh_seconds else ""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<meta name="color-scheme" content="light dark">{refresh}<title>{text(self.title)}</title>'
            f"<style>{_STYLE}</style></head><body><h1>{text(self.title)}</h1>{''.join(self._parts)}</body></html>\n"
        )

    def write(self, path: Path) -> Path:
        """Write it, whole or not at all."""
        aside = path.with_name(f".{path.name}.writing")
        aside.write_text(self.html(), encoding="utf-8")
        os.replace(aside, path)
        return path


@dataclass(frozen=True)
class Mark:
    """A word in a table that is good or bad."""

    words: str
    good: bool


def _cell(value: Any, digits: int) -> str:
    if isinstance(value, Mark):
        return f'<td class="{"good" if value.good else "bad"}">{text(value.words)}</td>'
    return f"<td>{number(value, digits)}</td>"
