"""The page of a run, from what it has written so far."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rm_scale.errors import DataError
from rm_scale.reporting.run.run_page import RunRecords, build_run_page
from tests.unit.reporting.test_page import check_page


@pytest.fixture
def run(full_run: Path, tmp_path: Path) -> Path:
    """A real run's records, to be changed."""
    shutil.copytree(full_run / "run", tmp_path / "out" / "run")
    return tmp_path / "out"


def test_a_finished_run(run: Path) -> None:
    records = RunRecords(run)
    html = build_run_page(records, refresh_seconds=5).html()
    check_page(html)
    assert "http-equiv" not in html, "it has ended: nothing to wait for"
    for words in (
        "Learning",
        "Throughput and memory",
        "Starts, saves and ends",
        "Final evaluation",
        "Data",
        "All settings",
    ):
        assert words in html
    assert html.count("<svg") >= 9
    accuracy = json.loads((run / "run" / "evaluation.json").read_text())["accuracy"]
    assert f"<b>{accuracy:,.4g}</b>held-out accuracy" in html
    assert build_run_page(RunRecords(run / "run")).html() == html, "its run/ will do too"


def test_a_run_that_goes_on(run: Path) -> None:
    attempts = run / "run" / "attempts.jsonl"
    attempts.write_text("".join(f"{line}\n" for line in attempts.read_text().splitlines() if '"end"' not in line))
    metrics = run / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 99, "loss": "nan", "accuracy": 0.5}\n{"step": 100, "lo')
    (run / "run" / "evaluation.json").unlink()
    html = build_run_page(RunRecords(run), refresh_seconds=5).html()
    check_page(html)
    assert '<meta http-equiv="refresh" content="5">' in html and "running; last event" in html
    assert "Final evaluation" not in html


def test_a_run_that_has_just_begun(run: Path) -> None:
    for file in (run / "run").iterdir():
        if file.name != "run_config.yaml":
            file.unlink()
    html = build_run_page(RunRecords(run)).html()
    check_page(html)
    assert "No step has been logged yet." in html and "not begun" in html


def test_the_step_is_the_runs_and_not_that_of_the_last_log_line(run: Path) -> None:
    """With `logging_steps` above the run's steps only the first is logged: 1 of 8 steps, said of a finished run."""
    metrics = run / "run" / "metrics.jsonl"
    first = next(line for line in metrics.read_text().splitlines() if '"loss"' in line)
    metrics.write_text(first + "\n")
    records = RunRecords(run)
    assert records.last_step == records.total_steps
    assert f"<b>{records.total_steps} / {records.total_steps}</b>step" in build_run_page(records).html()
    assert "logged at step 1<" in build_run_page(records).html()


def test_restarts_are_shown(run: Path) -> None:
    with (run / "run" / "attempts.jsonl").open("a") as file:
        for event in (
            {"event": "start", "attempt": 2, "time": 1.0, "step": 8},
            {"event": "end", "attempt": 2, "time": 2.0, "reason": "<b>SIGTERM</b>"},
        ):
            file.write(json.dumps(event) + "\n")
    html = build_run_page(RunRecords(run)).html()
    check_page(html)
    assert "Attempts: 2." in html and "&lt;b&gt;SIGTERM&lt;/b&gt;" in html


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds neither a run .* nor benchmark records"):
        RunRecords(tmp_path)
