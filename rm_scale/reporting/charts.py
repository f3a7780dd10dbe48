"""Small SVG charts without a library: lines, bars, histograms, scatter, stacked bars.

Colours are CSS variables that `rm_scale.reporting.page` sets for light and dark; text takes the page's own colour, so
that a chart fits wherever it stands. Each chart has a title and a description for those who don't see it. What can't
be drawn (nothing, or nothing finite) says so.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 640.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 14.0, 14.0, 46.0
_CHARACTER = 6.2
"""Width of a letter of the labels' size, about."""
COLOURS = tuple(f"var(--series-{number})" for number in range(1, 7))
_NUM_TICKS = 5

Number = float | int | None


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


@dataclass(frozen=True)
class Bar:
    """One bar.

    Attributes:
        name: beside it.
        value: `None` says that there is none.
        low, high: ends of an interval.
        note: a word behind the value.
    """

    name: str
    value: Number
    low: Number = None
    high: Number = None
    note: str = ""


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
        return _LEFT + _share(value, self.x_low, self.x_high, self.x.log) * (WIDTH - _LEFT - _RIGHT)

    def at_y(self, value: float) -> float:
        return HEIGHT - _BOTTOM - _share(value, self.y_low, self.y_high, self.y.log) * (HEIGHT - _TOP - _BOTTOM)


def lines(title: str, series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Lines or points over x, with bands where there are any.

    Args:
        title: for those who don't see it.
        series: up to six.
        x, y: the axes.
    """
    shown = [one for one in series if any(_is_good(v, y.log) for v in one.y)]
    xs = [value for one in shown for value, other in zip(one.x, one.y, strict=True) if _is_good(other, y.log)]
    xs = [value for value in xs if _is_good(value, x.log)]
    ys = [
        float(value)
        for one in shown
        for values in (one.y, one.low, one.high)
        for value in values
        if value is not None and _is_good(value, y.log)
    ]
    if not xs or not ys:
        return nothing(title)
    frame = _frame(x, y, xs, ys)
    for number, one in enumerate(shown):
        colour = COLOURS[number % len(COLOURS)]
        if one.low:
            frame.parts.append(_band(frame, one, colour))
        frame.parts.append(_points(frame, one, colour) if one.marks else _path(frame, one, colour))
    legend = [(one.name, COLOURS[number % len(COLOURS)]) for number, one in enumerate(shown) if one.name]
    return _finish(title, frame, legend if len(legend) > 1 else [])


def histogram(
    title: str, edges: Sequence[float], counts: Sequence[Number], x: Axis, split_at: float | None = None
) -> str:
    """Counts between edges.

    Args:
        title: for those who don't see it.
        edges: one more than counts.
        counts: of each bin.
        x: the axis of the edges.
        split_at: bins that begin below it take another colour.
    """
    pairs = list(zip(edges, edges[1:], counts, strict=False))
    good = [(a, b, float(c)) for a, b, c in pairs if _is_good(a) and _is_good(b) and _is_good(c) and c is not None]
    if not good or not any(count for _, _, count in good):
        return nothing(title)
    frame = _frame(x, Axis("count", low=0.0), [a for a, _, _ in good] + [good[-1][1]], [c for _, _, c in good])
    for low, high, count in good:
        left, right = frame.at_x(low), frame.at_x(high)
        colour = COLOURS[1] if split_at is not None and low < split_at else COLOURS[0]
        frame.parts.append(
            f'<rect x="{left + 0.5:.1f}" y="{frame.at_y(count):.1f}" width="{max(0.5, right - left - 1):.1f}" '
            f'height="{frame.at_y(0) - frame.at_y(count):.1f}" fill="{colour}"><title>{_number(low)} to '
            f"{_number(high)}: {_number(count)}</title></rect>"
        )
    return _finish(title, frame, [])


def bars(title: str, values: Sequence[Bar], axis: Axis, reference: float | None = None) -> str:
    """Horizontal bars with intervals; as high as there are bars.

    Args:
        title: for those who don't see it.
        values: from top to bottom.
        axis: of the values.
        reference: a line to compare with.
    """
    found = [value for bar in values for value in (bar.value, bar.low, bar.high)]
    ends = [float(value) for value in found if value is not None and _is_good(value)]
    if not any(_is_good(bar.value) for bar in values):
        return nothing(title)
    low = axis.low if axis.low is not None else min(0.0, *ends)
    high = axis.high if axis.high is not None else max(0.0, *ends)
    low, high = _spread(low, high)
    left = min(240.0, 12 + _CHARACTER * max(len(bar.name) for bar in values))
    right, step = 74.0, 24.0
    height = 8 + step * len(values) + 34

    def at(value: float) -> float:
        return left + min(1.0, max(0.0, (value - low) / (high - low))) * (WIDTH - left - right)

    parts = [_vertical(at(tick), 4, height - 34, _tick(tick, axis)) for tick in ticks(low, high)]
    if reference is not None and low <= reference <= high:
        parts.append(
            f'<line x1="{at(reference):.1f}" x2="{at(reference):.1f}" y1="4" y2="{height - 34:.1f}" class="ref"/>'
        )
    for number, bar in enumerate(values):
        parts.append(_bar(bar, 8 + step * number, at, left, axis))
    parts.append(_label(axis.label, left + (WIDTH - left - right) / 2, height - 4))
    return _svg(title, "".join(parts), height)


def stacked(title: str, names: Sequence[str], parts: Sequence[tuple[str, Sequence[Number]]], axis: Axis) -> str:
    """Horizontal bars made of parts, with a legend.

    Args:
        title: for those who don't see it.
        names: of the bars.
        parts: name, and its value in each bar.
        axis: of the values; `high` may be a limit that is drawn as a line.
    """
    totals = [sum(float(v[place] or 0) for _, v in parts) for place in range(len(names))]
    if not names or not any(total > 0 for total in totals):
        return nothing(title)
    high = max([*totals, axis.high or 0.0])
    left, step = min(240.0, 12 + _CHARACTER * max(map(len, names))), 26.0
    bottom = 8 + step * len(names)
    legend = _legend(
        [(name, COLOURS[number % len(COLOURS)]) for number, (name, _) in enumerate(parts)], 12, bottom + 50
    )

    def at(value: float) -> float:
        return left + value / high * (WIDTH - left - 30)

    drawn = [_vertical(at(tick), 4, bottom, _tick(tick, axis)) for tick in ticks(0.0, high) if tick <= high]
    for place, name in enumerate(names):
        start, top = 0.0, 8 + step * place
        drawn.append(f'<text x="{left - 6:.1f}" y="{top + 13:.1f}" text-anchor="end">{_text(name)}</text>')
        for number, (part, values) in enumerate(parts):
            value = float(values[place] or 0)
            width = max(0.0, at(start + value) - at(start))
            drawn.append(
                f'<rect x="{at(start):.1f}" y="{top:.1f}" width="{width:.1f}" height="17" '
                f'fill="{COLOURS[number % len(COLOURS)]}"><title>{_text(part)}: {_number(value)}</title></rect>'
            )
            start += value
    if axis.high is not None:
        drawn.append(f'<line x1="{at(axis.high):.1f}" x2="{at(axis.high):.1f}" y1="4" y2="{bottom:.1f}" class="ref"/>')
    drawn.append(_label(axis.label, left + (WIDTH - left) / 2, bottom + 32))
    return _svg(title, "".join(drawn) + legend[0], bottom + 50 + legend[1])


def nothing(title: str) -> str:
    """A place holder where there is nothing to draw."""
    return f'<p class="nothing">{_text(title)}: no data.</p>'


# --- Numbers ---------------------------------------------------------------------------------------------------------


_LEAST = 1e-290
"""Below this a float loses digits, and its half may be zero; numbers above its inverse are as good as infinite."""


def ticks(low: float, high: float, wanted: int = _NUM_TICKS) -> list[float]:
    """Round numbers between two ends: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two ends, with 2 and 5 of each where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 2, 5)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def _is_good(value: Number, log: bool = False) -> bool:
    return value is not None and abs(value) < 1 / _LEAST and (value > _LEAST or not log)


def _spread(low: float, high: float) -> tuple[float, float]:
    """Apart from each other, also when all values are the same, or so near that there is no number between them."""
    largest = max(abs(low), abs(high))
    if high - low > max(1e-12 * largest, _LEAST):
        return low, high
    margin = largest * 0.1 if largest > _LEAST else 1.0
    return low - margin, high + margin


def _share(value: float, low: float, high: float, log: bool) -> float:
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _number(value: float) -> str:
    if value == 0 or 0.001 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.2g}"


def _tick(value: float, axis: Axis) -> str:
    return f"{100 * value:.4g}%" if axis.percent else _number(value)


# --- Pieces ----------------------------------------------------------------------------------------------------------


def _text(text: str) -> str:
    return html.escape(str(text), quote=True)


def _frame(x: Axis, y: Axis, xs: Sequence[float], ys: Sequence[float]) -> _Frame:
    x_low, x_high = _ends(x, xs)
    y_low, y_high = _ends(y, ys)
    if not y.log and y.high is None:
        y_high += 0.04 * (y_high - y_low)
    frame = _Frame(x, y, x_low, x_high, y_low, y_high)
    bottom = HEIGHT - _BOTTOM
    for tick in log_ticks(x_low, x_high) if x.log else ticks(x_low, x_high):
        frame.parts.append(_vertical(frame.at_x(tick), _TOP, bottom, _tick(tick, x)))
    for tick in log_ticks(y_low, y_high) if y.log else ticks(y_low, y_high):
        at = frame.at_y(tick)
        frame.parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        frame.parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_tick(tick, y)}</text>')
    frame.parts.append(_label(x.label, (_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 8))
    middle = (_TOP + bottom) / 2
    turned = f'transform="rotate(-90 14 {middle:.1f})"'
    frame.parts.append(f'<text x="14" y="{middle:.1f}" text-anchor="middle" {turned}>{_text(y.label)}</text>')
    return frame


def _ends(axis: Axis, values: Sequence[float]) -> tuple[float, float]:
    low = axis.low if axis.low is not None else min(values)
    high = axis.high if axis.high is not None else max(values)
    if axis.log:
        return (low, high) if high > low * (1 + 1e-12) else (low / 2, high * 2)
    return _spread(low, high)


def _vertical(at: float, top: float, bottom: float, label: str) -> str:
    return (
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" class="grid"/>'
        f'<text x="{at:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{label}</text>'
    )


def _label(text: str, x: float, y: float) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{_text(text)}</text>' if text else ""


def _path(frame: _Frame, series: Series, colour: str) -> str:
    """A line that breaks where a value is missing."""
    commands, pen = [], "M"
    for x, y in zip(series.x, series.y, strict=True):
        if y is None or not _is_good(y, frame.y.log) or not _is_good(x, frame.x.log):
            pen = "M"
            continue
        commands.append(f"{pen}{frame.at_x(x):.1f} {frame.at_y(y):.1f}")
        pen = "L"
    dash = ' stroke-dasharray="5 4"' if series.dashed else ""
    name = f"<title>{_text(series.name)}</title>"
    return f'<path d="{" ".join(commands)}" fill="none" stroke="{colour}" stroke-width="2"{dash}>{name}</path>'


def _points(frame: _Frame, series: Series, colour: str) -> str:
    found = []
    lows, highs = list(series.low) or [None] * len(series.x), list(series.high) or [None] * len(series.x)
    for x, y, low, high in zip(series.x, series.y, lows, highs, strict=True):
        if y is None or not _is_good(y, frame.y.log) or not _is_good(x, frame.x.log):
            continue
        at = frame.at_x(x)
        if low is not None and high is not None and _is_good(low, frame.y.log) and _is_good(high, frame.y.log):
            ends = f'y1="{frame.at_y(low):.1f}" y2="{frame.at_y(high):.1f}"'
            found.append(f'<line x1="{at:.1f}" x2="{at:.1f}" {ends} stroke="{colour}" stroke-width="1.5"/>')
        tip = f"<title>{_text(series.name)} {_number(x)}: {_number(y)}</title>"
        found.append(f'<circle cx="{at:.1f}" cy="{frame.at_y(y):.1f}" r="3.5" fill="{colour}">{tip}</circle>')
    return "".join(found)


def _band(frame: _Frame, series: Series, colour: str) -> str:
    if series.marks:
        return ""
    points = [
        (x, low, high)
        for x, low, high in zip(series.x, series.low, series.high, strict=True)
        if low is not None and high is not None and _is_good(low, frame.y.log) and _is_good(high, frame.y.log)
        if _is_good(x, frame.x.log)
    ]
    there = [f"{frame.at_x(x):.1f},{frame.at_y(high):.1f}" for x, _, high in points]
    back = [f"{frame.at_x(x):.1f},{frame.at_y(low):.1f}" for x, low, _ in reversed(points)]
    return f'<polygon points="{" ".join(there + back)}" fill="{colour}" opacity="0.18"/>'


def _bar(bar: Bar, top: float, at: Callable[[float], float], left: float, axis: Axis) -> str:
    middle = top + 8.5
    name = bar.name if len(bar.name) * _CHARACTER < left else bar.name[: int(left / _CHARACTER) - 2] + "…"
    parts = [f'<text x="{left - 6:.1f}" y="{middle + 4:.1f}" text-anchor="end">{_text(name)}</text>']
    if bar.value is None or not _is_good(bar.value):
        return parts[0] + f'<text x="{left + 4:.1f}" y="{middle + 4:.1f}" class="faint">no data</text>'
    zero, end = at(0.0), at(bar.value)
    tip = f"<title>{_text(bar.name)}: {_tick(bar.value, axis)}</title>"
    parts.append(
        f'<rect x="{min(zero, end):.1f}" y="{top:.1f}" width="{abs(end - zero):.1f}" height="17" fill="{COLOURS[0]}" '
        f'opacity="0.75">{tip}</rect>'
    )
    right = end
    if bar.low is not None and bar.high is not None and _is_good(bar.low) and _is_good(bar.high):
        right = max(right, at(bar.high))
        parts.append(
            f'<path d="M{at(bar.low):.1f} {middle - 4}v8M{at(bar.low):.1f} {middle}H{at(bar.high):.1f}'
            f'M{at(bar.high):.1f} {middle - 4}v8" stroke="currentColor" fill="none" stroke-width="1.5"/>'
        )
    value = f"{_tick(bar.value, axis)} {_text(bar.note)}".rstrip()
    return "".join(parts) + f'<text x="{right + 6:.1f}" y="{middle + 4:.1f}">{value}</text>'


def _legend(entries: Sequence[tuple[str, str]], x: float, y: float) -> tuple[str, float]:
    """Names with their colours, in as many lines as they need; gives the height too."""
    parts, start, top = [], x, y
    for name, colour in entries:
        width = 22 + _CHARACTER * len(name) + 12
        if start + width > WIDTH and start > x:
            start, top = x, top + 18
        parts.append(f'<rect x="{start:.1f}" y="{top - 9:.1f}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{start + 15:.1f}" y="{top:.1f}">{_text(name)}</text>')
        start += width
    return "".join(parts), top - y + 12 if entries else 0.0


def _finish(title: str, frame: _Frame, legend: Sequence[tuple[str, str]]) -> str:
    drawn, height = _legend(legend, _LEFT, HEIGHT + 12)
    return _svg(title, "".join(frame.parts) + drawn, HEIGHT + (height + 6 if legend else 0))


def _svg(title: str, content: str, height: float) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{_text(title)}" class="chart" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{_text(title)}</title>{content}</svg>'
    )
