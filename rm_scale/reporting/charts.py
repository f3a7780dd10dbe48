"""Small SVG charts without a library: lines, points and histograms; bars are in `bar_charts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rm_scale.reporting.chart_parts import (
    HEIGHT,
    WIDTH,
    Axis,
    axis_label,
    colour_of,
    escaped,
    legend_of,
    nothing,
    svg,
    tick_text,
    vertical,
)
from rm_scale.reporting.chart_scales import Number, is_good, log_ticks, plain, share, spread, ticks

_LEFT, _RIGHT, _TOP, _BOTTOM = 78.0, 14.0, 14.0, 46.0
_MAX_HOVER = 100
"""With more points than this a line tells its name alone: the page would grow, and nobody could hit one."""


@dataclass(frozen=True)
class Series:
    """Points that belong together.

    Attributes:
        name: in the legend.
        x, y: as many of each; a missing y breaks a line.
        low, high: a band around y.
        marks: draw points rather than a line.
        dashed: for what is expected rather than seen.
    """

    name: str
    x: Sequence[float]
    y: Sequence[Number]
    low: Sequence[Number] = ()
    high: Sequence[Number] = ()
    marks: bool = False
    dashed: bool = False


@dataclass
class _Frame:
    """Where numbers lie in the picture."""

    x: Axis
    y: Axis
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    parts: list[str] = field(default_factory=list)

    def at_x(self, value: float) -> float:
        return _LEFT + share(value, self.x_low, self.x_high, self.x.log) * (WIDTH - _LEFT - _RIGHT)

    def at_y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - share(value, self.y_low, self.y_high, self.y.log) * (HEIGHT - _TOP - _BOTTOM)


def lines(title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Draw lines or points over x, with bands where there are any.

    Args:
        title: for those who don't see it.
        series: up to six.
        x, y: the axes.
    """
    shown = [one for one in series if any(is_good(v, y.log) for v in one.y)]
    xs = [value for one in shown for value, other in zip(one.x, one.y, strict=True) if is_good(other, y.log)]
    xs = [value for value in xs if is_good(value, x.log)]
    ys = [
        float(value)
        for one in shown
        for values in (one.y, one.low, one.high)
        for value in values
        if value is not None and is_good(value, y.log)
    ]
    if not xs or not ys:
        return nothing(title)
    frame = _frame(x, y, xs, ys)
    for number, one in enumerate(shown):
        colour = colour_of(number)
        if one.low:
            frame.parts.append(_band(frame, one, colour))
        frame.parts.append(_points(frame, one, colour) if one.marks else _path(frame, one, colour))
    legend = [(one.name, colour_of(number)) for number, one in enumerate(shown) if one.name]
    return _finish(title, frame, legend if len(legend) > 1 else [])


def histogram(
    title: str, edges: Sequence[float], counts: Sequence[Number], x: Axis, split_at: float | None = None
) -> str:
    """Draw counts between edges.

    Args:
        title: for those who don't see it.
        edges: one more than counts.
        counts: of each bin.
        x: the axis of the edges.
        split_at: bins that begin below it take another colour.
    """
    pairs = list(zip(edges, edges[1:], counts, strict=False))
    good = [(a, b, float(c)) for a, b, c in pairs if is_good(a) and is_good(b) and is_good(c) and c is not None]
    if not good or not any(count for _, _, count in good):
        return nothing(title)
    frame = _frame(x, Axis("count", low=0.0), [a for a, _, _ in good] + [good[-1][1]], [c for _, _, c in good])
    for low, high, count in good:
        left, right = frame.at_x(low), frame.at_x(high)
        colour = colour_of(1) if split_at is not None and low < split_at else colour_of(0)
        frame.parts.append(
            f'<rect x="{left + 0.5:.1f}" y="{frame.at_y(count):.1f}" width="{max(0.5, right - left - 1):.1f}" '
            f'height="{frame.at_y(0) - frame.at_y(count):.1f}" fill="{colour}"><title>{plain(low)} to '
            f"{plain(high)}: {plain(count)}</title></rect>"
        )
    return _finish(title, frame, [])


# --- Pieces ----------------------------------------------------------------------------------------------------------


def _frame(x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float]) -> _Frame:
    x_low, x_high = _ends(x, xs)
    y_low, y_high = _ends(y, ys)
    if not y.log and y.high is None:
        y_high += 0.04 * (y_high - y_low)
    frame = _Frame(x, y, x_low, x_high, y_low, y_high)
    bottom = HEIGHT - _BOTTOM
    for tick in log_ticks(x_low, x_high) if x.log else ticks(x_low, x_high):
        frame.parts.append(vertical(frame.at_x(tick), _TOP, bottom, tick_text(tick, x)))
    for tick in log_ticks(y_low, y_high) if y.log else ticks(y_low, y_high):
        at = frame.at_y(tick)
        frame.parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        frame.parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{tick_text(tick, y)}</text>')
    frame.parts.append(axis_label(x.label, (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 8))
    middle = (_TOP + bottom) / 2
    turned = f'transform="rotate(-90 14 {middle:.1f})"'
    frame.parts.append(f'<text x="14" y="{middle:.1f}" text-anchor="middle" {turned}>{escaped(y.label)}</text>')
    return frame


def _ends(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    low = axis.low if axis.low is not None else min(values)
    high = axis.high if axis.high is not None else max(values)
    if axis.log:
        return (low, high) if high > low * (1 + 1e-12) else (low / 2, high * 2)
    return spread(low, high)


def _path(frame: _Frame, series: Series, colour: str) -> str:
    """Draw a line that breaks where a value is missing; a point without a neighbour, which has no line, is a dot."""
    parts: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series.x, series.y, strict=True):
        if y is None or not is_good(y, frame.y.log) or not is_good(x, frame.x.log):
            parts.append([])
        else:
            parts[-1].append((x, y))
    points = [point for part in parts for point in part]
    places = {point: (f"{frame.at_x(point[0]):.1f}", f"{frame.at_y(point[1]):.1f}") for point in points}
    drawn = " ".join("M" + "L".join(" ".join(places[point]) for point in part) for part in parts if len(part) > 1)
    dash = ' stroke-dasharray="5 4"' if series.dashed else ""
    name = f"<title>{escaped(series.name)}</title>"
    path = f'<path d="{drawn}" fill="none" stroke="{colour}" stroke-width="2"{dash}>{name}</path>' if drawn else ""
    lone = {part[0] for part in parts if len(part) == 1}
    dots = [
        f'<circle cx="{places[point][0]}" cy="{places[point][1]}" {_size(point in lone, colour)}>'
        f"{_tip(series.name, *point)}</circle>"
        for point in points
        if point in lone or len(points) <= _MAX_HOVER
    ]
    return path + "".join(dots)


def _size(is_seen: bool, colour: str) -> str:
    return f'r="4" fill="{colour}"' if is_seen else 'r="6" fill-opacity="0"'


def _tip(name: str, x: float, y: float) -> str:
    """Return what a point tells on hover."""
    return f"<title>{escaped(name)} {plain(x)}: {plain(y)}</title>"


def _points(frame: _Frame, series: Series, colour: str) -> str:
    found = []
    lows, highs = list(series.low) or [None] * len(series.x), list(series.high) or [None] * len(series.x)
    for x, y, low, high in zip(series.x, series.y, lows, highs, strict=True):
        if y is None or not is_good(y, frame.y.log) or not is_good(x, frame.x.log):
            continue
        at = frame.at_x(x)
        if low is not None and high is not None and is_good(low, frame.y.log) and is_good(high, frame.y.log):
            ends = f'y1="{frame.at_y(low):.1f}" y2="{frame.at_y(high):.1f}"'
            found.append(f'<line x1="{at:.1f}" x2="{at:.1f}" {ends} stroke="{colour}" stroke-width="1.5"/>')
        tip = _tip(series.name, x, y)
        found.append(f'<circle cx="{at:.1f}" cy="{frame.at_y(y):.1f}" r="3.5" fill="{colour}">{tip}</circle>')
    return "".join(found)


def _band(frame: _Frame, series: Series, colour: str) -> str:
    if series.marks:
        return ""
    points = [
        (x, low, high)
        for x, low, high in zip(series.x, series.low, series.high, strict=True)
        if low is not None and high is not None and is_good(low, frame.y.log) and is_good(high, frame.y.log)
        if is_good(x, frame.x.log)
    ]
    there = [f"{frame.at_x(x):.1f},{frame.at_y(high):.1f}" for x, _, high in points]
    back = [f"{frame.at_x(x):.1f},{frame.at_y(low):.1f}" for x, low, _ in reversed(points)]
    return f'<polygon points="{" ".join(there + back)}" fill="{colour}" opacity="0.18"/>'


def _finish(title: str, frame: _Frame, legend: Sequence[tuple[str, str]]) -> str:
    drawn, height = legend_of(legend, _LEFT, HEIGHT + 12)
    return svg(title, "".join(frame.parts) + drawn, HEIGHT + (height + 6 if legend else 0))
