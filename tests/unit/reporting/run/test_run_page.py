"""The page of a run, from what it has written so far."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rm_scale.errors import DataError
from rm_scale.reporting.run.run_page import RunRecords, build_run_page
from rm_scale.training.attempts import Attempt, refuse_idle_restart
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


# --- Records that were edited, cut short or damaged ------------------------------------------------------------------

WRONG: list[Any] = [None, "x", -1, 1e308, 10**400, [], {"a": None}]
JSON_RECORDS = ("plan", "environment", "evaluation", "data_report", "plan_check", "timing")
LINE_RECORDS = ("attempts", "metrics", "steps", "warnings")


def places_of(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where values stand, the whole and three levels below it; of many of a kind the first."""
    yield place
    if len(place) < 3:
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value[:1]))
        are_of_a_kind = (
            len(place) > 0 and isinstance(value, dict) and len({str(type(one)) for one in value.values()}) == 1
        )
        for key, inner in items[:1] if are_of_a_kind else items:
            yield from places_of(inner if isinstance(inner, dict | list) else [], (*place, key))


def changed(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    if not place:
        return new
    found = copy.deepcopy(value)
    inner = found
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return found


def require_a_page(run: Path, what: object) -> None:
    try:
        assert "</html>" in build_run_page(RunRecords(run)).html()
        refuse_idle_restart(run / "run", 0)
        assert Attempt(run / "run", True).number >= 1
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


@pytest.mark.parametrize("name", JSON_RECORDS)
def test_a_wrong_value_in_a_record_leaves_its_part_empty(run: Path, name: str) -> None:
    path = run / "run" / f"{name}.json"
    written = json.loads(path.read_text())
    written.setdefault("score_histogram", {"edges": [0.0, 1.0], "counts": [3]})
    written.setdefault("reasons", {"over_long": 3})
    for place in places_of(written):
        for new in WRONG:
            path.write_text(json.dumps(changed(written, place, new)))
            require_a_page(run, (place, new))


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("name", LINE_RECORDS)
def test_a_wrong_value_in_a_line_leaves_its_part_empty(run: Path, name: str, ended: bool) -> None:
    if not ended:
        attempts = run / "run" / "attempts.jsonl"
        attempts.write_text("".join(f"{x}\n" for x in attempts.read_text().splitlines() if '"end"' not in x))
    path = run / "run" / f"{name}.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    lines = lines or [{"time": 1.0, "step": None, "name": "plan", "text": "x"}]
    kinds = {(tuple(line), line.get("event")): number for number, line in enumerate(lines)}
    for number in kinds.values():
        for place in lines[number]:
            for new in WRONG:
                now = [*lines[:number], {**lines[number], place: new}, *lines[number + 1 :]]
                path.write_text("".join(json.dumps(line) + "\n" for line in now))
                require_a_page(run, (place, new))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"step": ' + "[" * 900 + "]" * 900 + "}", "null", "\0", "pipe"])
def test_what_is_no_record_leaves_its_part_empty(run: Path, content: str) -> None:
    for name in (*(f"{one}.json" for one in JSON_RECORDS), *(f"{one}.jsonl" for one in LINE_RECORDS)):
        path = run / "run" / name
        before = path.read_bytes() if path.is_file() else b""
        path.unlink(missing_ok=True)
        if content == "pipe":
            os.mkfifo(path)
        else:
            path.write_text(content)
        require_a_page(run, name)
        path.unlink()
        path.write_bytes(before)


def test_settings_that_are_dates_are_shown(run: Path) -> None:
    with (run / "run" / "run_config.yaml").open("a") as file:
        file.write("extra: [2026-01-01]\nfurther: {2026-01-01: 1}\n")
    html = build_run_page(RunRecords(run)).html()
    assert "[&quot;2026-01-01&quot;]" in html and "datetime.date(2026, 1, 1): 1" in html
