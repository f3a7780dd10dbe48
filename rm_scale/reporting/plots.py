"""Pictures of a run, drawn from `run/metrics.jsonl`.

python -m rm_scale.reporting.plots RUN_DIR --output loss.png
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rm_scale.errors import DataError


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The logged steps of a run.

    Raises:
        DataError: the folder holds no metrics.
    """
    path = run_dir / "run" / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read ({error}). Fix: give the output directory of a run.") from error


def plot_loss(run_dir: Path, output: Path) -> Path:
    """Draw training loss and accuracy over steps, with the evaluations, into a PNG file.

    Args:
        run_dir: a run's output directory.
        output: the picture to write.

    Raises:
        DataError: no metrics there, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("pictures need matplotlib. Fix: pip install matplotlib.") from error
    lines = read_metrics(run_dir)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, name, chance in ((panels[0], "loss", 0.6931), (panels[1], "accuracy", 0.5)):
        train = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), float)]
        held_out = [(line["step"], line[f"eval_{name}"]) for line in lines if f"eval_{name}" in line]
        panel.plot(*_columns(train), color="#9db4cf", linewidth=1, label="training, as logged")
        panel.plot(*_columns(_smooth(train)), color="#1f4e8c", linewidth=2, label="training, smoothed")
        panel.plot(*_columns(held_out), "o", color="#c8501e", label="held out")
        panel.axhline(chance, color="#888888", linewidth=1, linestyle=":", label="chance")
        panel.set(xlabel="optimizer step", title=name)
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=110)
    return output


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _smooth(points: list[tuple[int, float]], weight: float = 0.8) -> list[tuple[int, float]]:
    """Exponential moving average, corrected for its start."""
    smoothed, mean, total = [], 0.0, 0.0
    for step, value in points:
        mean = weight * mean + (1 - weight) * value
        total = weight * total + (1 - weight)
        smoothed.append((step, mean / total))
    return smoothed


def main() -> int:
    """Draw the picture of one run."""
    parser = argparse.ArgumentParser(description="Draw loss and accuracy of a run.")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    print(plot_loss(options.run_dir, options.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
