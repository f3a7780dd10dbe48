"""What becomes of a job: the exit code that its nodes' records come to, and whether it is requeued."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rm_scale.files import read_json_lines
from rm_scale.slurm.job_start import Start
from rm_scale.slurm.requeue import Decision, Job, decide, failed_node, judge, main


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """An attempt on one node, written down as the job's script finds it."""
    folder = tmp_path / "7" / "attempt-2"
    folder.mkdir(parents=True)
    place: dict[str, Any] = {"job_id": 7, "attempt": 2, "nodes": ("a",), "ranks_per_node": 2, "gpus_per_node": 0}
    place |= {"master_addr": "127.0.0.1", "master_port": 1, "train": "train.py", "settings": (), "asked": ()}
    made = Start(**place, output_dir=str(tmp_path / "out"), folder=str(folder))
    made.write()
    return made


# --- How the ranks ended ---------------------------------------------------------------------------------------------


def ended(node: str, code: int, at: float | None = None, reason: str = "") -> dict[str, Any]:
    """One node's record."""
    return {"node": node, "code": code, "failed_at": at, "time": at or 9.0, "reason": reason}


@pytest.mark.parametrize(
    ("ends", "srun", "expected"),
    [
        ({"a": ended("a", 0), "b": ended("b", 0)}, 0, (0, "")),
        ({"a": ended("a", 85), "b": ended("b", 85)}, 0, (85, "")),
        ({"a": ended("a", 1, 5.0, "rank 0"), "b": ended("b", 137, 4.0, "rank 3")}, 1, (137, "b: rank 3")),
        ({"a": ended("a", 2, 5.0, "rank 0 refused")}, 137, (2, "a: rank 0 refused")),
        ({"a": ended("a", 85)}, 137, (137, "b: lost or killed before")),
        ({"a": ended("a", 85)}, 0, (1, "b: lost or killed before")),
        ({"a": ended("a", 3), "b": ended("b", 85)}, 3, (3, "")),
        ({"a": ended("a", 0), "b": ended("b", 0)}, 1, (1, "srun failed")),
    ],
)  # fmt: skip
def test_the_first_failure_decides(start: Start, ends: dict[str, Any], srun: int, expected: tuple[int, str]) -> None:
    code, reason = judge(replace(start, nodes=("a", "b")), ends, srun)
    assert code == expected[0] and reason.startswith(expected[1])


# --- What follows ----------------------------------------------------------------------------------------------------

RUNNING = Job(restarts=0, max_restarts=100, state="RUNNING")
REQUEUED = Decision("requeue", 85, ("stopped", "requeue"))


@pytest.mark.parametrize("code", [0, 1, 2, 3, 137])
def test_what_has_not_saved_and_stopped_is_not_requeued(code: int) -> None:
    assert decide(code, RUNNING) == Decision("exit", code, ("end",))


@pytest.mark.parametrize(
    "job",
    [
        RUNNING,
        replace(RUNNING, restarts=99),  # the last restart that is allowed
        replace(RUNNING, state=""),  # the controller does not answer: try
        replace(RUNNING, state="COMPLETING", is_at_limit=True),  # the time limit has come
        replace(RUNNING, state="COMPLETING", is_preempted=True),  # PreemptMode=CANCEL
    ],
)
def test_what_saved_and_stopped_is_requeued(job: Job) -> None:
    assert decide(85, job) == REQUEUED


def test_no_more_restarts_than_allowed() -> None:
    decision = decide(85, replace(RUNNING, restarts=3, max_restarts=3))
    reason = "restarted 3 times (RM_SCALE_MAX_RESTARTS): not requeued; submit again to go on"
    assert decision == Decision("exit", 85, ("stopped",), reason)


def test_what_is_ended_from_outside_is_not_requeued() -> None:
    """By scancel, which is meant; or by a preemption, after which Slurm requeues it."""
    decision = decide(85, replace(RUNNING, state="COMPLETING"))
    reason = "saved and stopped; the job is being ended from outside (COMPLETING), so it does not requeue itself"
    assert decision == Decision("exit", 85, ("stopped", "cancelled"), reason)


def test_a_job_that_slurm_has_requeued_is_not_requeued_twice() -> None:
    decision = decide(85, replace(RUNNING, state="COMPLETING", is_preempted=True, is_requeued=True))
    assert (decision.action, decision.events) == ("exit", ("stopped", "requeue"))


def test_attempts_that_end_before_training_begins_are_limited() -> None:
    assert decide(85, replace(RUNNING, idle_attempts=2)) == Decision("requeue", 85, ("idle", "stopped", "requeue"))
    last = decide(85, replace(RUNNING, idle_attempts=3))
    assert (last.action, last.code, last.events) == ("exit", 2, ("idle", "end"))
    assert last.reason.startswith("the last 3 attempts were stopped before training began")
    assert decide(85, replace(RUNNING, idle_attempts=3, is_preempted=True)) == REQUEUED, "no fault of the start"
    at_limit = replace(RUNNING, state="COMPLETING", is_at_limit=True, idle_attempts=3)
    assert decide(85, at_limit).action == "exit"
    assert decide(137, replace(RUNNING, idle_attempts=3)) == Decision("exit", 137, ("end",))


CRASHED = replace(RUNNING, retries_left=1, has_saved=True)


@pytest.mark.parametrize("code", [1, 137, 139])
def test_a_crash_after_progress_is_retried_where_the_site_allows_it(code: int) -> None:
    decision = decide(code, CRASHED)
    assert (decision.action, decision.code, decision.events) == ("requeue", code, ("end", "retry", "requeue"))


@pytest.mark.parametrize(
    ("code", "job"),
    [
        (0, CRASHED),
        (2, CRASHED),  # the same message again
        (3, CRASHED),  # replaced by a later attempt
        (137, replace(CRASHED, retries_left=0)),
        (137, replace(CRASHED, has_saved=False)),  # it would most likely happen again
        (137, replace(CRASHED, state="COMPLETING")),  # killed by scancel
        (137, replace(CRASHED, restarts=100)),
    ],
)
def test_other_ends_are_not_retried(code: int, job: Job) -> None:
    assert decide(code, job).action == "exit"


def test_a_port_that_was_taken_is_changed_a_few_times() -> None:
    assert [decide(86, replace(RUNNING, ports_tried=tried)).action for tried in range(6)] == [
        *4 * ["again"],
        "exit",
        "exit",
    ]


# --- As the job's script calls it ------------------------------------------------------------------------------------


def call(start: Start, srun_code: str, **facts: str) -> int:
    """Run it for a job in its third attempt, which `facts` can change."""
    job = f"JobId=7 JobState={facts.pop('state', 'RUNNING')} Reason=None Restarts=2 PreemptTime=None"
    given = {"restarts": "2", "max_restarts": "100", "job": job, **facts}
    return main([start.folder, "--srun_code", srun_code, *(f"--{name}={value}" for name, value in given.items())])


def events(start: Start) -> list[dict[str, Any]]:
    """What it wrote into the job's records, without the time."""
    found = read_json_lines(Path(start.folder).parent / "events.jsonl")
    assert all(abs(time.time() - event.pop("time")) < 60 for event in found)
    return found


def test_a_failure_is_told_and_its_code_printed(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(start.folder) / "a.end.json").write_text(json.dumps(ended("a", 2, 1.0, "rank 1 refused the run")))
    (Path(start.folder) / "b.end.json").write_text("{half")
    assert call(start, "137") == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("exit 2\n", "rm_scale: a: rank 1 refused the run\n")
    assert events(start) == [{"event": "end", "attempt": 2, "code": "2"}]


def test_a_stopped_run_is_requeued(
    start: Start, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RM_SCALE_TIER", "13b")
    (Path(start.folder) / "a.end.json").write_text(json.dumps(ended("a", 85)))
    assert call(start, "0") == 0
    assert capsys.readouterr().out == "requeue 85\n"
    expected = [{"event": name, "attempt": 2, "script": "13b"} for name in ("stopped", "requeue")]
    assert events(start) == expected


def test_a_job_that_was_stopped_before_any_rank_is_requeued(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(start, "none") == 0
    assert capsys.readouterr().out == "requeue 85\n"


def saved(start: Start, attempt: int) -> None:
    """Write down that an attempt of the job published a checkpoint."""
    path = Path(start.output_dir) / "run" / "attempts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"event": "saved", "attempt": 9, "job_id": "7", "restart_count": attempt, "step": 5}))


def test_retries_are_counted_and_the_failed_node_is_left_out(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(start.folder) / "a.end.json").write_text(json.dumps(ended("a", 137, 1.0, "rank 1 was killed")))
    saved(start, attempt=1)
    call(start, "137", retries="1")
    saved(start, attempt=2)
    call(start, "137", retries="1")
    call(start, "137", retries="1")
    assert capsys.readouterr().out == "exit 137\nrequeue 137 a\nexit 137\n"


@pytest.mark.parametrize(
    ("a", "b", "left_out"),
    [
        ({"code": 134, "failed_at": 1.0}, {"code": 1, "failed_at": 2.0}, "a"),
        ({"code": 1, "failed_at": 1.0}, {"code": 134, "failed_at": 2.0}, ""),  # a traceback comes on any node
        ({"code": 1, "failed_at": 1.0, "blames_device": True}, {"code": 85}, "a"),
        ({"code": 85}, None, "b"),
    ],
)
def test_a_node_is_left_out_where_it_is_to_blame(
    a: dict[str, Any], b: dict[str, Any] | None, left_out: str, start: Start
) -> None:
    ends = {name: {**ended(name, 0), **end} for name, end in (("a", a), ("b", b)) if end is not None}
    assert failed_node(replace(start, nodes=("a", "b")), ends) == left_out


def test_what_slurm_shows_of_the_job_decides(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    shown = "JobId=7 JobState=COMPLETING Reason={} Restarts={} PreemptTime={}"
    for reason, restarts, preempted in (
        ("TimeLimit", 2, "None"),
        ("None", 2, "2026-11-30T23:31:21"),
        ("None", 3, "None"),
    ):
        call(start, "none", job=shown.format(reason, restarts, preempted))
    assert capsys.readouterr().out == "requeue 85\nrequeue 85\nexit 85\n"


def test_a_job_that_does_not_begin_is_told_so(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    call(start, "none", idle="2")
    call(start, "none", idle="3")
    printed = capsys.readouterr()
    assert printed.out == "requeue 85\nexit 2\n" and "not requeued. Fix: " in printed.err
    assert [event["event"] for event in events(start)] == ["idle", "stopped", "requeue", "idle", "end"]


def test_a_full_disk_does_not_keep_the_job_from_being_requeued(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path(start.folder).parent / "events.jsonl").mkdir()  # stands for a file that can't be written
    assert call(start, "none") == 0
    assert capsys.readouterr().out == "requeue 85\n"
