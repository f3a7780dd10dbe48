"""When a run stops, what is written down of its attempts, and when another restart is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from rm_scale.errors import TrainingError
from rm_scale.training import preemption
from rm_scale.training.attempts import Attempt, read_attempts, refuse_idle_restart
from rm_scale.training.hang_report import explain_hang
from rm_scale.training.preemption import StopReason, reason_now
from rm_scale.training.recorded_times import RecordedTimes, recorded_times
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


def test_who_starts_jobs_is_told_that_the_attempt_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "begun"
    monkeypatch.setenv("RM_SCALE_BEGUN_FILE", str(path))
    Attempt(tmp_path, False).begin()
    waiting = Attempt(tmp_path, True)
    assert not path.exists()
    waiting.begin()
    assert path.exists()
    monkeypatch.setenv("RM_SCALE_BEGUN_FILE", str(path / "not a folder"))
    Attempt(tmp_path, True).begin()  # for the lack of a mark no run may end


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


def test_a_stop_file_asks(tmp_path: Path) -> None:
    assert reason_now(tmp_path) is StopReason.NONE
    (tmp_path / "STOP").touch()
    assert reason_now(tmp_path) is StopReason.STOP_FILE


def note_times(folder: Path, limit: float, **first: float) -> None:
    """Record what an attempt knew of its time before its first step, and of that step."""
    attempt = Attempt(folder, True, step=20)
    attempt.begin()
    attempt.note("time_limit", limit_seconds=limit, startup_seconds=60.0, save_seconds=40.0, margin_seconds=85.0)
    if first:
        attempt.note("first_step", 21, loaded_seconds=60.0, **first)
    attempt.note("end", 20, reason="stopped: wall clock")


def test_a_limit_that_is_too_short_is_refused_with_its_figures(tmp_path: Path) -> None:
    for _ in range(2):
        note_times(tmp_path, 100.0)
    note_times(tmp_path, 100.0, seconds=10.0, startup_seconds=70.0)
    with pytest.raises(TrainingError) as refused:
        refuse_idle_restart(tmp_path, 20)
    figures = "start-up takes 70 s, a step 10 s, a save about 40 s, limit 100 s, the run stops 85 s before it."
    assert f"The time limit is too short: {figures} Fix: " in str(refused.value)
    assert "ask for more time" in str(refused.value)


def test_figures_are_given_without_a_verdict_where_the_limit_was_long_enough(tmp_path: Path) -> None:
    for _ in range(3):
        note_times(tmp_path, 3600.0)
    with pytest.raises(TrainingError, match="Of the time limit: start-up takes 60 s, no step was completed, a save"):
        refuse_idle_restart(tmp_path, 20)
    record_attempt(tmp_path, 20, reason="ValueError: a broken row")
    with pytest.raises(TrainingError, match=r"the same\. Fix: "):
        refuse_idle_restart(tmp_path, 20)


def test_an_attempt_that_never_started_up_names_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RM_SCALE_START_TIME", "1000")
    monkeypatch.setenv("RM_SCALE_END_TIME", "1600")
    for _ in range(3):
        record_attempt(tmp_path, 20, reason=None)
    with pytest.raises(TrainingError, match=r"It was still starting up, and its time limit was 600 s\. Fix: "):
        refuse_idle_restart(tmp_path, 20)


def test_what_attempts_took_is_read_from_their_record(tmp_path: Path) -> None:
    assert recorded_times(read_attempts(tmp_path)) == RecordedTimes()
    note_times(tmp_path, 100.0, seconds=10.0, startup_seconds=70.0)
    attempt = Attempt(tmp_path, True)
    for seconds in (500.0, 3.0, 1.0, 1.0, 2.0, 1.0):  # the first is too long ago to count
        attempt.note("saved", 30, seconds=seconds, parts={"model": 0.5, "state": 0.1})
    found = recorded_times(read_attempts(tmp_path))
    assert found == RecordedTimes(100.0, 85.0, 70.0, 10.0, 20.0, 3.0, 40.0)
    attempt.note("saved", 40, seconds=2.0, parts={"model": 0.5, "seal": 0.1})  # of the weights alone
    assert recorded_times(read_attempts(tmp_path)).save == 8.0


@pytest.mark.parametrize("value", [None, "x", [], {}, -1, 1e308, 10**400, True])
@pytest.mark.parametrize("event", ["time_limit", "first_step", "saved"])
def test_wrong_times_end_no_restart(tmp_path: Path, event: str, value: object) -> None:
    names = ("seconds", "parts", "limit_seconds", "margin_seconds", "startup_seconds", "save_seconds", "loaded_seconds")
    for _ in range(3):
        note_times(tmp_path, 100.0, seconds=10.0, startup_seconds=70.0)
    attempt = Attempt(tmp_path, True)
    attempt.number = 3
    facts: dict[str, object] = dict.fromkeys(names, value)
    attempt.note(event, 20, **facts)
    with pytest.raises(TrainingError, match="the last 3 attempts"):
        refuse_idle_restart(tmp_path, 20)


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
