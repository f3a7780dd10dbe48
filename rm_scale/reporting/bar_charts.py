"""Horizontal bars: with intervals, in groups side by side, or made of parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rm_scale.reporting.chart_parts import (
    CHARACTER,
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
from rm_scale.reporting.chart_scales import Number, is_good, plain, share, spread, ticks

_PHONE_CHARACTER = 7.7
"""Width of a letter on a narrow screen, where labels are larger."""


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


def bars(title: str, values: Sequence[Bar], axis: Axis, reference: float | None = None) -> str:
    """Draw horizontal bars with intervals; the chart is as high as there are bars.

    Args:
        title: for those who don't see it.
        values: from top to bottom.
        axis: of the values.
        reference: a line to compare with.
    """
    found = [value for bar in values for value in (bar.value, bar.low, bar.high)]
    ends = [float(value) for value in found if value is not None and is_good(value)]
    if not any(is_good(bar.value) for bar in values):
        return nothing(title)
    low = axis.low if axis.low is not None else min(0.0, *ends)
    high = axis.high if axis.high is not None else max(0.0, *ends)
    low, high = spread(low, high)
    left = min(240.0, 12 + CHARACTER * max(len(bar.name) for bar in values))
    right, step = 74.0, 24.0
    height = 8 + step * len(values) + 34

    def at(value: float) -> float:
        return left + min(1.0, max(0.0, (value - low) / (high - low))) * (WIDTH - left - right)

    parts = [vertical(at(tick), 4, height - 34, tick_text(tick, axis)) for tick in ticks(low, high)]
    if reference is not None and low <= reference <= high:
        parts.append(
            f'<line x1="{at(reference):.1f}" x2="{at(reference):.1f}" y1="4" y2="{height - 34:.1f}" class="ref"/>'
        )
    for number, bar in enumerate(values):
        parts.append(_bar(bar, 8 + step * number, at, left, axis))
    parts.append(axis_label(axis.label, left + (WIDTH - left - right) / 2, height - 4))
    return svg(title, "".join(parts), height)


def grouped(
    title: str,
    names: Sequence[str],
    parts: Sequence[tuple[str, Sequence[Bar]]],
    axis: Axis,
    colours: Sequence[int] = range(6),
) -> str:
    """Draw horizontal bars side by side in groups, with a legend.

    Args:
        title: for those who don't see it.
        names: of the groups, from top to bottom.
        parts: name of a bar in each group, and the bars; the name of each bar is what it tells on hover.
        axis: of the values, which begin at 0.
        colours: numbers of the parts' colours.
    """
    values = [float(bar.value) for _, drawn in parts for bar in drawn if bar.value is not None and is_good(bar.value)]
    if not names or not values or max(values) <= 0:
        return nothing(title)
    low, high = 0.0, axis.high if axis.high is not None else max(values)
    left, right = min(240.0, 12 + _PHONE_CHARACTER * max(map(len, names))), 13 * _PHONE_CHARACTER + 12
    thick = 15.0
    step = thick * len(parts) + 11
    bottom = 8 + step * len(names)

    def at(value: float) -> float:
        return left + share(value, low, high, False) * (WIDTH - left - right)

    found = [vertical(at(tick), 4, bottom, tick_text(tick, axis)) for tick in ticks(low, high)]
    for place, name in enumerate(names):
        top = 8 + step * place
        middle = top + thick * len(parts) / 2
        found.append(f'<text x="{left - 6:.1f}" y="{middle + 4:.1f}" text-anchor="end">{escaped(name)}</text>')
        for number, (_, drawn) in enumerate(parts):
            found.append(_group_bar(drawn[place], top + thick * number, thick, at, axis, colours[number]))
    legend, height = legend_of([(name, colour_of(colours[n])) for n, (name, _) in enumerate(parts)], 12, bottom + 50)
    found.append(axis_label(axis.label, left + (WIDTH - left - right) / 2, bottom + 32))
    return svg(title, "".join(found) + legend, bottom + 50 + height)


def _group_bar(bar: Bar, top: float, thick: float, at: Callable[[float], float], axis: Axis, number: int) -> str:
    start, base = at(0.0), top + thick - 4.5
    if bar.value is None or not is_good(bar.value):
        return f'<text x="{start + 4:.1f}" y="{base:.1f}" class="faint">{escaped(bar.note or "no data")}</text>'
    end = max(start, at(bar.value))
    shown = f"{tick_text(bar.value, axis)} {escaped(bar.note)}".rstrip()
    return (
        f'<rect x="{start:.1f}" y="{top:.1f}" width="{end - start:.1f}" height="{thick - 2:.1f}" '
        f'fill="{colour_of(number)}"><title>{escaped(bar.name)}: {shown}</title></rect>'
        f'<text x="{end + 6:.1f}" y="{base:.1f}">{shown}</text>'
    )


def stacked(title: str, names: Sequence[str], parts: Sequence[tuple[str, Sequence[Number]]], axis: Axis) -> str:
    """Draw horizontal bars made of parts, with a legend.

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
    left, step = min(240.0, 12 + CHARACTER * max(map(len, names))), 26.0
    bottom = 8 + step * len(names)
    legend = legend_of([(name, colour_of(number)) for number, (name, _) in enumerate(parts)], 12, bottom + 50)

    def at(value: float) -> float:
        return left + value / high * (WIDTH - left - 30)

    drawn = [vertical(at(tick), 4, bottom, tick_text(tick, axis)) for tick in ticks(0.0, high) if tick <= high]
    for place, name in enumerate(names):
        start, top = 0.0, 8 + step * place
        drawn.append(f'<text x="{left - 6:.1f}" y="{top + 13:.1f}" text-anchor="end">{escaped(name)}</text>')
        for number, (part, values) in enumerate(parts):
            value = float(values[place] or 0)
            width = max(0.0, at(start + value) - at(start))
            drawn.append(
                f'<rect x="{at(start):.1f}" y="{top:.1f}" width="{width:.1f}" height="17" '
                f'fill="{colour_of(number)}"><title>{escaped(name)}, {escaped(part)}: {plain(value)}</title></rect>'
            )
            start += value
    if axis.high is not None:
        drawn.append(f'<line x1="{at(axis.high):.1f}" x2="{at(axis.high):.1f}" y1="4" y2="{bottom:.1f}" class="ref"/>')
    drawn.append(axis_label(axis.label, left + (WIDTH - left) / 2, bottom + 32))
    return svg(title, "".join(drawn) + legend[0], bottom + 50 + legend[1])


def _bar(bar: Bar, top: float, at: Callable[[float], float], left: float, axis: Axis) -> str:
    middle = top + 8.5
    name = bar.name if len(bar.name) * CHARACTER < left else bar.name[: int(left / CHARACTER) - 2] + "…"
    parts = [f'<text x="{left - 6:.1f}" y="{middle + 4:.1f}" text-anchor="end">{escaped(name)}</text>']
    if bar.value is None or not is_good(bar.value):
        return parts[0] + f'<text x="{left + 4:.1f}" y="{middle + 4:.1f}" class="faint">no data</text>'
    zero, end = at(0.0), at(bar.value)
    tip = f"<title>{escaped(bar.name)}: {tick_text(bar.value, axis)}</title>"
    parts.append(
        f'<rect x="{min(zero, end):.1f}" y="{top:.1f}" width="{abs(end - zero):.1f}" height="17" fill="{colour_of(0)}" '
        f'opacity="0.75">{tip}</rect>'
    )
    right = end
    if bar.low is not None and bar.high is not None and is_good(bar.low) and is_good(bar.high):
        right = max(right, at(bar.high))
        parts.append(
            f'<path d="M{at(bar.low):.1f} {middle - 4}v8M{at(bar.low):.1f} {middle}H{at(bar.high):.1f}'
            f'M{at(bar.high):.1f} {middle - 4}v8" stroke="currentColor" fill="none" stroke-width="1.5"/>'
        )
    value = f"{tick_text(bar.value, axis)} {escaped(bar.note)}".rstrip()
    return "".join(parts) + f'<text x="{right + 6:.1f}" y="{middle + 4:.1f}">{value}</text>'
