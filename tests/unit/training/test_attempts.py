"""When a run stops, what is written down of its attempts, and when another restart is refused."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from rm_scale.errors import TrainingError
from rm_scale.training import preemption
from rm_scale.training.attempts import Attempt, read_attempts, refuse_idle_restart
from rm_scale.training.hang_report import explain_hang
from rm_scale.training.preemption import StopReason, end_time, margin_seconds, reason_now
from rm_scale.training.slow_ranks import slow_ranks


def record_attempt(folder: Path, start: int, *saved: int, reason: str | None = "RuntimeError: x") -> None:
    """Record an attempt: where it began, what it saved, how it ended; `None`: it was killed."""
    attempt = Attempt(folder, True, step=start)
    attempt.begin()
    for step in saved:
        attempt.note("saved", step)
    if reason is not None:
        attempt.note("end", reason=reason)


def test_three_attempts_without_progress_are_the_last(tmp_path: Path) -> None:
    record_attempt(tmp_path, 0, 10, 20)
    for reason in ("SIGKILL", None):
        record_attempt(tmp_path, 20, reason=reason)
    refuse_idle_restart(tmp_path, 20)
    record_attempt(tmp_path, 20, 20, reason="stopped: SIGUSR1")
    with pytest.raises(TrainingError, match=r"the last 3 attempts of this run started at step 20 and saved nothing"):
        refuse_idle_restart(tmp_path, 20)
    refuse_idle_restart(tmp_path, 10)  # from another checkpoint it is another story


def test_an_attempt_with_progress_or_an_end_clears_the_count(tmp_path: Path) -> None:
    for _ in range(2):
        record_attempt(tmp_path, 5)
    record_attempt(tmp_path, 5, 6)
    record_attempt(tmp_path, 5)
    refuse_idle_restart(tmp_path, 5)
    for _ in range(4):
        record_attempt(tmp_path, 8, reason="finished")
    refuse_idle_restart(tmp_path, 8)


@pytest.mark.parametrize("value", [None, "x", [], {}, -1, 1e308, 10**400, True])
@pytest.mark.parametrize("name", ["event", "attempt", "time", "step", "reason"])
def test_a_wrong_value_ends_no_restart(tmp_path: Path, name: str, value: object) -> None:
    for _ in range(2):
        record_attempt(tmp_path, 5)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write(json.dumps({"event": "start", "attempt": 2, "time": 1.0, "step": 5} | {name: value}) + "\n")
    assert Attempt(tmp_path, True).number == 3
    refuse_idle_restart(tmp_path, 5)
    for event in read_attempts(tmp_path):
        assert isinstance(event["event"], str)
        assert all(isinstance(event.get(number, 0), int) for number in ("attempt", "step"))
        assert isinstance(event.get("time", 0.0), float)


def test_a_half_written_line_is_passed_over(tmp_path: Path) -> None:
    record_attempt(tmp_path, 3)
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"event": "sav')
    assert [event["event"] for event in read_attempts(tmp_path)] == ["start", "end"]
    assert Attempt(tmp_path, True).number == 2


def test_the_record_of_an_older_version_comes_first(tmp_path: Path) -> None:
    old = {"event": "start", "life": 3, "time": 1.0, "step": 5}
    (tmp_path / "lives.jsonl").write_text(json.dumps(old) + "\n")
    record_attempt(tmp_path, 8)
    assert [(event["attempt"], event["step"]) for event in read_attempts(tmp_path)] == [(3, 5), (4, 8), (4, 8)]


def test_only_the_main_rank_writes_and_a_fresh_attempt_leaves_no_trace_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Attempt(tmp_path / "run", True).recorded():
        raise RuntimeError("bad data")
    Attempt(tmp_path / "run", False).begin()
    assert not (tmp_path / "run").exists()


def test_an_error_becomes_the_reason(tmp_path: Path) -> None:
    attempt = Attempt(tmp_path, True)
    with pytest.raises(KeyError), attempt.recorded():
        attempt.begin()
        raise KeyError("x")
    assert read_attempts(tmp_path)[-1]["reason"] == "KeyError: 'x'"


def test_signals_are_remembered_and_not_obeyed() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        preemption.watch_signals()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert preemption.received_signal() is StopReason.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.received_signal() is StopReason.SIGTERM
    finally:
        preemption.forget_signals()
        for number, handler in before.items():
            signal.signal(number, handler)


def test_file_and_clock(tmp_path: Path) -> None:
    soon = {"RM_SCALE_END_TIME": str(time.time() + 50)}
    assert reason_now(tmp_path, 60, {}) is StopReason.NONE
    assert reason_now(tmp_path, 40, soon) is StopReason.NONE
    assert reason_now(tmp_path, 60, soon) is StopReason.WALL_CLOCK
    (tmp_path / "STOP").touch()
    assert reason_now(tmp_path, 60, soon) is StopReason.STOP_FILE


def test_whose_clock_counts() -> None:
    assert end_time({"RM_SCALE_END_TIME": "5", "SLURM_JOB_END_TIME": "9"}) == 5.0
    assert end_time({"RM_SCALE_END_TIME": "soon", "SLURM_JOB_END_TIME": "9"}) == 9.0
    assert end_time({}) is None


def test_the_margin_follows_what_was_measured() -> None:
    assert margin_seconds(None, 0.0, 1.0) == 60.0
    assert margin_seconds(None, 100.0, 20.0) == 250.0
    assert margin_seconds(5.0, 100.0, 20.0) == 5.0


def report(rank: int, state: str, step: int = 7) -> dict[str, object]:
    return {"rank": rank, "step": step, "place": f"micro-batch {rank}", "state": state, "at": f"file.py:{rank} (f)"}


def test_a_hang_names_who_is_missing() -> None:
    text = explain_hang([report(0, "collective"), report(1, "work"), report(3, "collective")], 4, "nothing has moved")
    assert "step 7: nothing has moved: " in text
    assert "rank 2 does not answer (dead, frozen, or its node is lost)" in text
    assert "rank 1 did not reach the collective: rank 1 stands at file.py:1 (f) in micro-batch 1" in text
    text = explain_hang([report(0, "collective"), report(1, "collective")], 2, "nothing has moved")
    assert "all ranks wait in a collective, at: micro-batch 0 at file.py:0 (f); micro-batch 1" in text


def test_slow_ranks_are_measured_against_the_median() -> None:
    assert slow_ranks([1.0, 1.1, 0.9, 2.2]) == [(3, pytest.approx(2.2))]
    assert slow_ranks([1.0, 2.0]) == [(1, 2.0)]
    assert slow_ranks([1.0, 1.4, 1.0]) == []
    assert slow_ranks([0.0, 0.0]) == []


@pytest.mark.parametrize(("value", "count"), [("", 0), ("2", 2), ("two", 0), ("²", 0)])
def test_what_slurm_says_of_restarts_is_recorded_if_it_is_a_number(
    value: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", value)
    attempt = Attempt(tmp_path, is_main=True, resume=None, step=0)
    attempt.begin()
    assert read_attempts(tmp_path)[0]["restart_count"] == count
