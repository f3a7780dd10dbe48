"""The numbers of a chart: round ticks, where a value lies between two ends, and how a label says it."""

from __future__ import annotations

import math

NUM_TICKS = 5

Number = float | int | None

_LEAST = 1e-290
"""Below this a float loses digits, and its half may be zero; numbers above its inverse are as good as infinite."""


def ticks(low: float, high: float, wanted: int = NUM_TICKS) -> list[float]:
    """Return round numbers between two ends: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten between two ends, with 2 and 5 of each where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 2, 5)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def is_good(value: Number, log: bool = False) -> bool:
    """Return whether a value can be drawn: finite, and above zero on a logarithmic axis."""
    return value is not None and abs(value) < 1 / _LEAST and (value > _LEAST or not log)


def spread(low: float, high: float) -> tuple[float, float]:
    """Return two ends that are apart, also when all values are the same or too near for a number between them."""
    largest = max(abs(low), abs(high))
    if high - low > max(1e-12 * largest, _LEAST):
        return low, high
    margin = largest * 0.1 if largest > _LEAST else 1.0
    return low - margin, high + margin


def share(value: float, low: float, high: float, log: bool) -> float:
    """Return where a value lies between two ends, from 0 to 1."""
    if log:
        value, low, high = math.log(value), math.log(low), math.log(high)
    return min(1.0, max(0.0, (value - low) / (high - low)))


def plain(value: float) -> str:
    """Return a number as a label says it."""
    if value == 0 or 0.001 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.2g}"
