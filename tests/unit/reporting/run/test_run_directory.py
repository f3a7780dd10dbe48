"""The `run/` folder when a run resumes: later steps go, whatever else a record holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rm_scale.config import RunConfig
from rm_scale.reporting.run.run_directory import forget_later_metrics


@pytest.mark.parametrize("name", ["metrics.jsonl", "steps.jsonl"])
def test_lines_without_a_step_that_is_a_number_go(tmp_path: Path, name: str) -> None:
    config = RunConfig(model_name_or_path="m", dataset_path=["d.jsonl"], output_dir=str(tmp_path / "out"))
    path = tmp_path / "out" / "run" / name
    path.parent.mkdir(parents=True)
    kept = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2)]
    steps: tuple[Any, ...] = (10**400, None, "1", [], {"a": 1}, True, float("nan"))
    wrong = [json.dumps({"step": step}) for step in steps]
    other = ["[" * 100_000, "{" + '"a": {' * 900, "[1]", "1", "null", '{"step": 1', json.dumps({"step": 3})]
    path.write_text("\n".join([kept[0], *wrong, *other, kept[1]]) + "\n")
    forget_later_metrics(config, 2)
    assert path.read_text().splitlines() == kept
