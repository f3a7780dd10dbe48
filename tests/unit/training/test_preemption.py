"""Requests to stop: which signals count, and whose; when the job's time is up, and how early a run stops for that."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rm_scale.training.preemption import (
    END_FILE_SECONDS,
    NUM_ATTEMPT_SIGNALS,
    attempt_signal,
    end_time,
    goes_on_for_a_step,
    margin_seconds,
    spare_seconds,
    time_limit,
)

WATCH = """
import os, signal, sys
from rm_scale.training.preemption import received_signal, watch_signals
watch_signals({"RM_SCALE_ATTEMPT": sys.argv[1]} if sys.argv[1] else {})
os.kill(os.getpid(), int(sys.argv[2]))
print(received_signal().name)
"""


def outcome(attempt: str, number: int) -> str:
    """What a process of an attempt makes of a signal."""
    done = subprocess.run(
        [sys.executable, "-c", WATCH, attempt, str(number)], env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_request_for_an_earlier_attempt_is_ignored() -> None:
    """One that was still on its way when an administrator requeued the job stopped the next attempt at once."""
    assert outcome("1", attempt_signal(0)) == "NONE"
    assert outcome("1", attempt_signal(1)) == "SIGUSR1"


@pytest.mark.parametrize(("number", "name"), [(10, "SIGUSR1"), (15, "SIGTERM")])
def test_anybodys_request_counts_in_every_attempt(number: int, name: str) -> None:
    assert outcome("3", number) == outcome("", number) == name


def test_the_signals_of_attempts_are_real_time_signals() -> None:
    numbers = {attempt_signal(attempt) for attempt in range(1000)}
    assert len(numbers) == NUM_ATTEMPT_SIGNALS and min(numbers) >= 34 and max(numbers) <= 64


# --- The job's time --------------------------------------------------------------------------------------------------


def test_whose_clock_counts(tmp_path: Path) -> None:
    assert end_time({"RM_SCALE_END_TIME": "5", "SLURM_JOB_END_TIME": "9"}) == 5.0
    assert end_time({"RM_SCALE_END_TIME": "soon", "SLURM_JOB_END_TIME": "9"}) == 9.0
    assert end_time({"RM_SCALE_END_TIME": "nan", "SLURM_JOB_END_TIME": "inf"}) is None
    assert end_time({}) is None
    (tmp_path / "end").write_text("7\n")
    assert end_time({"RM_SCALE_END_TIME_FILE": str(tmp_path / "end"), "RM_SCALE_END_TIME": "5"}) == 7.0
    assert end_time({"RM_SCALE_END_TIME_FILE": str(tmp_path / "end")}) == 7.0


@pytest.mark.parametrize("content", [None, b"", b"soon\n", b"\xff\xfe7", b"-1", b"1e999", b"5" * 100_000, b"7\n8\n"])
def test_a_missing_or_broken_file_leaves_the_variable_in_force(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "end").write_bytes(content)
    assert end_time({"RM_SCALE_END_TIME_FILE": str(tmp_path / "end"), "RM_SCALE_END_TIME": "5"}) == 5.0
    assert end_time({"RM_SCALE_END_TIME_FILE": str(tmp_path), "RM_SCALE_END_TIME": "5"}) == 5.0


def test_an_end_that_is_moved_is_seen(tmp_path: Path) -> None:
    """Put there, replaced: each is seen after two seconds at most."""
    path = tmp_path / "end"
    variables = {"RM_SCALE_END_TIME_FILE": str(path), "RM_SCALE_END_TIME": "50", "RM_SCALE_START_TIME": "10"}
    assert (end_time(variables), time_limit(variables)) == (50.0, 40.0)
    for content in ("90", "30"):
        (tmp_path / "new").write_text(content)
        (tmp_path / "new").rename(path)
        time.sleep(END_FILE_SECONDS)
        assert (end_time(variables), time_limit(variables)) == (float(content), float(content) - 10)


@pytest.mark.parametrize("content", [None, b"", b"soon"])
def test_a_disk_that_is_away_does_not_bring_back_an_end_that_was_moved(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "end"
    variables = {"RM_SCALE_END_TIME_FILE": str(path), "RM_SCALE_END_TIME": "50"}
    path.write_text("90")
    assert end_time(variables) == 90.0
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    time.sleep(END_FILE_SECONDS)
    assert end_time(variables) == 90.0
    (tmp_path / "new").write_text("70")
    (tmp_path / "new").rename(path)
    time.sleep(END_FILE_SECONDS)
    assert end_time(variables) == 70.0


def test_the_limit_is_known_only_with_both_ends() -> None:
    assert time_limit({"RM_SCALE_START_TIME": "100", "RM_SCALE_END_TIME": "700"}) == 600.0
    assert time_limit({"RM_SCALE_END_TIME": "700"}) is None
    assert time_limit({"RM_SCALE_START_TIME": "100"}) is None
    assert time_limit({"RM_SCALE_START_TIME": "700", "RM_SCALE_END_TIME": "700"}) is None


def test_the_margin_follows_what_was_measured() -> None:
    assert margin_seconds(None, 0.0, 1.0) == 60.0
    assert margin_seconds(None, 100.0, 20.0) == 250.0
    assert margin_seconds(5.0, 100.0, 20.0) == 5.0


def test_of_a_short_limit_the_margin_is_a_share() -> None:
    assert margin_seconds(None, 0.0, 1.0, 24 * 3600.0) == margin_seconds(None, 0.0, 1.0, 240.0) == 60.0
    assert margin_seconds(None, 0.0, 1.0, 60.0) == 15.0
    assert spare_seconds(None) == 10.0 and spare_seconds(60.0) == 2.5
    assert margin_seconds(None, 10.0, 1.0, 60.0) == 24.5, "what was measured counts all the same"


def test_a_request_before_the_first_step_waits_for_it_where_there_is_time() -> None:
    assert not goes_on_for_a_step(None, 60.0, 0.0, None), "nobody knows when the job ends"
    assert goes_on_for_a_step(500.0, 60.0, 20.0, None)
    # Within the margin: the next attempt, which has no more time, would stop here as well.
    assert goes_on_for_a_step(50.0, 60.0, 20.0, 600.0)
    assert not goes_on_for_a_step(50.0, 60.0, 20.0, None)
    assert not goes_on_for_a_step(19.0, 60.0, 20.0, 600.0), "a step and a save would not be whole"
    assert not goes_on_for_a_step(-5.0, 60.0, 0.0, 600.0)
