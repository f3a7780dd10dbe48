"""The picture of a run is a real picture, and a folder that is no run is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rm_scale.errors import DataError
from rm_scale.reporting.plots import plot_loss, read_metrics


def test_picture_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lines = [{"step": step, "loss": 0.7 - step / 100, "accuracy": 0.5} for step in range(5)]
    lines.append({"step": 5, "eval_loss": 0.6, "eval_accuracy": 0.6})
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture = plot_loss(tmp_path, tmp_path / "deep" / "loss.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5_000


def test_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: can't be read"):
        read_metrics(tmp_path)
