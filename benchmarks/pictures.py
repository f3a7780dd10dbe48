"""Pictures for docs/pictures/: predicted against measured figures, and pairs per second against TRL.

python -m benchmarks.pictures      writes the picture of the README, docs/pictures/throughput_against_trl.svg
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_scale.reporting.benchmarks.peer_comparison import layouts_chart, settings_of
from rm_scale.reporting.benchmarks.record_tables import Row, rows_of
from rm_scale.reporting.benchmarks.sealed_records import read_records
from rm_scale.reporting.chart_parts import standalone

REPOSITORY = Path(__file__).resolve().parents[1]
AGAINST_TRL = REPOSITORY / "docs" / "pictures" / "throughput_against_trl.svg"
RECORDS = REPOSITORY / "benchmarks" / "results" / "amd-epyc-2cores" / "135m.jsonl"
SHOWN = ((0, 1), (3, 1))
"""ZeRO stage and ranks of the settings that the README shows; docs/results.md shows all."""


@dataclass(frozen=True)
class Point:
    """A figure that was measured and predicted, and the kind it belongs to."""

    measured: float
    predicted: float
    kind: str


def scatter(points: Sequence[Point], unit: str, band: float, title: str, file: Path) -> None:
    """Draw predicted against measured, on logarithmic axes, a colour per kind.

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
    """Import matplotlib without a screen, so that its files are the same for the same picture."""
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


def against_trl(rows: Sequence[Row]) -> str:
    """Return the README's picture as SVG: pairs per second of TRL and of our packed layouts.

    Args:
        rows: of one model and machine.
    """
    shown = [row for row in rows if (row.record.case.zero_stage, row.record.case.num_ranks) in SHOWN]
    heading = "Training a 135M reward model on two CPU cores: pairs per second, more is better"
    chart = layouts_chart(heading, settings_of(shown), ["padding_free", "prefix_shared"])
    return standalone(chart, heading)


def main() -> None:
    """Write the README's picture from the committed records."""
    AGAINST_TRL.write_text(against_trl(rows_of(read_records([RECORDS]).records)), encoding="utf-8")
    print(AGAINST_TRL.relative_to(REPOSITORY))


if __name__ == "__main__":
    main()
