"""Pictures of predicted against measured figures, for docs/pictures/."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Point:
    """A figure that was measured and predicted, and the kind it belongs to."""

    measured: float
    predicted: float
    kind: str


def scatter(points: Sequence[Point], unit: str, band: float, title: str, file: Path) -> None:
    """Predicted against measured, on logarithmic axes, a colour per kind.

    Args:
        points: what to draw.
        unit: of both axes.
        band: relative error that is drawn in grey.
        title: above the picture.
        file: SVG to write.
    """
    pyplot = start_pyplot(title)
    figure, axes = pyplot.subplots(figsize=(6, 5))
    for kind, marker in zip(sorted({point.kind for point in points}), itertools.cycle("osv^D<>ph*"), strict=False):
        chosen = [point for point in points if point.kind == kind]
        x, y = [point.measured for point in chosen], [point.predicted for point in chosen]
        axes.plot(x, y, marker, markersize=4, alpha=0.7, label=kind)
    ends = [0.8 * min(point.measured for point in points), 1.25 * max(point.measured for point in points)]
    axes.plot(ends, ends, color="black", linewidth=0.8)
    axes.fill_between(ends, [(1 - band) * e for e in ends], [(1 + band) * e for e in ends], color="grey", alpha=0.15)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel=f"measured, {unit}", ylabel=f"predicted, {unit}")
    axes.legend(fontsize=7)
    axes.set_title(title, fontsize=9)
    save(pyplot, figure, file)


def start_pyplot(salt: str) -> Any:
    """matplotlib without a screen, whose files are the same for the same picture."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = salt
    return pyplot


def save(pyplot: Any, figure: Any, file: Path) -> None:
    """Write and forget a figure."""
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
