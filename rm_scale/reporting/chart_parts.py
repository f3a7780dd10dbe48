"""What all charts are made of: axes, ticks, labels, legends, and the SVG around them.

Colours are CSS variables that `rm_scale.reporting.style` sets for light and dark; text takes the page's own colour, so
that a chart fits wherever it stands. Each chart has a title for those who don't see it, and its points and bars tell
their value on hover. What can't be drawn (nothing, or nothing finite) says so.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rm_scale.reporting.chart_scales import plain
from rm_scale.reporting.style import CHARTS, COLOURS, FONT

WIDTH, HEIGHT = 640.0, 320.0
_HEADING = 26.0
CHARACTER = 7.4
"""Width of a letter of the labels where they are largest, on narrow screens, about."""
_COLOURS = tuple(f"var(--series-{number})" for number in range(1, 7))


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        label: what it shows, with the unit.
        low, high: ends; default those of the data.
        log: logarithmic.
        percent: ticks as percent.
    """

    label: str = ""
    low: float | None = None
    high: float | None = None
    log: bool = False
    percent: bool = False


def standalone(chart: str, heading: str) -> str:
    """Return a chart as an SVG file of its own, for light and dark pages.

    It brings its colours, and its own background too: a page's colours need not be those that the reader's system asks
    for.

    Args:
        chart: an `svg`.
        heading: a line above it.
    """
    begin, _, rest = chart.partition(">")
    height = float(begin.partition(f'viewBox="0 0 {WIDTH:.0f} ')[2].partition('"')[0]) + _HEADING
    begin = re.sub(r'viewBox="[^"]*"', f'viewBox="0 0 {WIDTH:.0f} {height:.0f}"', begin)
    style = f"{COLOURS}.chart{{color:var(--fore);font-family:{FONT}}}\n{CHARTS}"
    return (
        f'{begin} width="{WIDTH:.0f}" height="{height:.0f}"><style>{style}</style>'
        f'<rect width="{WIDTH:.0f}" height="{height:.0f}" rx="6" fill="var(--back)"/>'
        f'<text x="12" y="20" font-weight="600">{escaped(heading)}</text><g transform="translate(0 {_HEADING:.0f})">'
        f"{rest.removesuffix('</svg>')}</g></svg>\n"
    )


def nothing(title: str) -> str:
    """Return a place holder where there is nothing to draw."""
    return f'<p class="nothing">{escaped(title)}: no data.</p>'


def tick_text(value: float, axis: Axis) -> str:
    """Return a value as the labels of an axis say it."""
    return f"{100 * value:.4g}%" if axis.percent else plain(value)


def colour_of(number: int) -> str:
    """Return the colour of the series with this number, from 0."""
    return _COLOURS[number % len(_COLOURS)]


def escaped(text: str) -> str:
    """Return a text as it may stand in SVG."""
    return html.escape(str(text), quote=True)


def vertical(at: float, top: float, bottom: float, label: str) -> str:
    """Draw a line of the grid with the label of its tick below."""
    return (
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" class="grid"/>'
        f'<text x="{at:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{label}</text>'
    )


def axis_label(text: str, x: float, y: float) -> str:
    """Write the label of a horizontal axis, centred at x."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escaped(text)}</text>' if text else ""


def legend_of(entries: Sequence[tuple[str, str]], x: float, y: float) -> tuple[str, float]:
    """Return names with their colours, in as many lines as they need, and the height of these."""
    parts, start, top = [], x, y
    for name, colour in entries:
        width = 22 + CHARACTER * len(name) + 12
        if start + width > WIDTH and start > x:
            start, top = x, top + 18
        parts.append(f'<rect x="{start:.1f}" y="{top - 9:.1f}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{start + 15:.1f}" y="{top:.1f}">{escaped(name)}</text>')
        start += width
    return "".join(parts), top - y + 12 if entries else 0.0


def svg(title: str, content: str, height: float) -> str:
    """Put a chart's drawing into an image that is as wide as the page allows."""
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escaped(title)}" class="chart" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escaped(title)}</title>{content}</svg>'
    )
