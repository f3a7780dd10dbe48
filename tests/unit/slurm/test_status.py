"""`rm-scale slurm status`, from records as a job leaves them, with Slurm's word and without."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rm_scale.cli import main as cli
from rm_scale.slurm import status
from rm_scale.slurm.job_records import last_errors, read_records
from rm_scale.slurm.job_start import Start

TOLD = {"JobId": "7", "JobName": "rm_13b", "JobState": "RUNNING", "Reason": "None", "NodeList": "node[1-2]"}
TOLD |= {"Restarts": "1", "RunTime": "00:10:00", "TimeLimit": "2-00:00:00", "ExitCode": "0:0"}


def write_lines(path: Path, lines: list[dict[str, Any]], more: str = "") -> None:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + more)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Two attempts: the first was signalled and requeued, the second has made some steps, and one rank of it failed."""
    folder, output = tmp_path / "logs" / "7", tmp_path / "out"
    for attempt in (0, 1):
        own = folder / f"attempt-{attempt}"
        own.mkdir(parents=True)
        Start(7, attempt, ("a", "b"), 8, 8, "a", 20049, "train.py", (), (), str(output), str(own)).write()
    events = [("attempt", 100.0, 0), ("signal", 150.0, 0), ("requeue", 161.5, 0), ("attempt", 200.0, 1)]
    write_lines(folder / "events.jsonl", [{"event": e, "time": t, "attempt": n} for e, t, n in events])
    attempts = [("first_step", 110.0, 1, 0, 7), ("first_step", 230.0, 2, 1, "7"), ("first_step", 300.0, 3, 1, "8")]
    names = ("event", "time", "attempt", "restart_count", "job_id")
    write_lines(output / "run" / "attempts.jsonl", [dict(zip(names, line, strict=True)) for line in attempts])
    steps = [
        {"step": n, "loss": 0.5, "accuracy": 0.75, "num_pairs": 64, "pairs_per_second": 16.0} for n in (10, 11, 12)
    ]
    write_lines(output / "run" / "metrics.jsonl", steps, '{"step": 13, "lo')
    (output / "run" / "plan.json").write_text(json.dumps({"total_steps": 912}))
    return folder


def test_everything_is_told(logs: Path) -> None:
    answer = status.summarise(TOLD, read_records(logs))
    assert (answer["step"], answer["total_steps"], answer["ranks"], answer["attempts"]) == (12, 912, 16, 2)
    assert answer["step_seconds"] == 4.0 and answer["eta_seconds"] == 900 * 4.0
    assert answer["signal_to_requeue_seconds"] == [11.5]
    assert answer["start_to_first_resumed_step_seconds"] == [30.0], "of this job only, and of later attempts"
    told = status.as_text("7", answer)
    assert "job 7 rm_13b: RUNNING on node[1-2], 00:10:00 of 2-00:00:00, restarts 1" in told
    assert "attempt 2: step 12 of 912, loss 0.5000, accuracy 0.750, 16.0 pairs/s, 1.0 h of training left" in told
    assert "from signal to requeue: 11.5 s" in told and "from start to first resumed step: 30.0 s" in told


def test_the_first_failed_ranks_errors_are_shown(logs: Path) -> None:
    last = logs / "attempt-1"
    end = {"node": "b", "code": 1, "failed_at": 240.0, "time": 241.0, "reason": "rank 9 failed (its traceback ...)"}
    (last / "b.end.json").write_text(json.dumps(end))
    (last / "a.rank0.log").write_text("RuntimeError: Connection reset by peer\n")
    (last / "b.rank9.log").write_text("fine\n" * 5 + "ValueError: a bad row\n\x00\xff binary\n")
    records = read_records(logs)
    assert last_errors(records) == ["b.rank9.log: ValueError: a bad row"]
    assert "ended: b: rank 9 failed" in status.as_text("7", status.summarise({}, records))


def test_a_job_that_waits_and_one_that_is_gone(tmp_path: Path, logs: Path) -> None:
    waiting = status.as_text("9", status.summarise({**TOLD, "JobState": "PENDING", "Reason": "Resources"}, None))
    assert "PENDING (Resources)" in waiting and "no records yet" in waiting
    empty = tmp_path / "logs" / "9"
    empty.mkdir()
    told = status.as_text("9", status.summarise({}, read_records(empty)))
    assert "Slurm does not know it any more" in told and "attempt 1: no step logged yet" in told


def test_the_command(logs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(status, "ask_slurm", lambda job: [])
    assert cli(["slurm", "status", "7", "--logs", str(logs.parent), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 12
    assert cli(["slurm", "status", "8", "--logs", str(logs.parent)]) == 2
    assert "job 8: Slurm does not know it (any more), and there are no records" in capsys.readouterr().err
    for bad in ("7; rm -rf", "", "7_", "٧"):
        assert cli(["slurm", "status", bad]) == 2
        assert "must be a job's number" in capsys.readouterr().err
    assert cli(["slurm", "status", "a" * 100_000]) == 2
    assert len(capsys.readouterr().err) < 500


def tool(folder: Path, name: str, code: str) -> None:
    """A stand-in for one of Slurm's commands."""
    (folder / name).write_text(f"#!/bin/sh\n{code}\n")
    (folder / name).chmod(0o755)


def test_slurms_answer_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/nowhere:/bin")
    tool(tmp_path, "scontrol", "echo 'JobId=7 JobName=x UserId=me(1) JobState=RUNNING Reason=None Comment=a=b'")
    tool(tmp_path, "sacct", "exit 1")
    assert [entry["JobState"] for entry in status.ask_slurm("7")] == ["RUNNING"]
    tool(tmp_path, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert status.ask_slurm("7") == []
    tool(tmp_path, "sacct", "echo '7|7|rm_1b|CANCELLED by 0|node1|00:10:00|12:00:00|0:15|/home/me'; echo 'x|y'")
    told = status.ask_slurm("7")[0]
    assert (told["JobState"], told["RunTime"], told["WorkDir"]) == ("CANCELLED", "00:10:00", "/home/me")
    monkeypatch.setenv("PATH", "/nowhere")
    assert status.ask_slurm("7") == []


def test_an_array_is_shown_task_by_task(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    common = f"JobName=rm_1b WorkDir={tmp_path} TimeLimit=12:00:00"
    lines = [
        f"JobId=5 ArrayJobId=5 ArrayTaskId=4-7%2 JobState=PENDING Reason=Priority {common}",
        f"JobId=8 ArrayJobId=5 ArrayTaskId=1 JobState=FAILED Reason=NonZeroExitCode ExitCode=2:0 {common}",
        f"JobId=7 ArrayJobId=5 ArrayTaskId=0 JobState=RUNNING Reason=None NodeList=node1 {common}",
    ]
    tool(tmp_path, "scontrol", "".join(f"echo '{line}'\n" for line in lines))
    rest = "rm_1b|COMPLETED|node2|00:01:00|12:00:00|0:0|/"
    tool(tmp_path, "sacct", f"echo '5_2|9|{rest}'; echo '5_0|7|{rest}'")
    assert cli(["slurm", "status", "5"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "job 5 rm_1b: array of 7 tasks: 1 RUNNING, 1 FAILED, 1 COMPLETED, 4 PENDING",
        "5_0        RUNNING on node1, attempt 2: step 12 of 912, loss 0.5000",
        "5_1        FAILED (NonZeroExitCode), exit code 2:0",
        "5_2        COMPLETED on node2",
        "5_[4-7%2]  PENDING (Priority)",
        "one of them in full: rm-scale slurm status 5_N",
    ]
    assert cli(["slurm", "status", "5", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["states"] == {"RUNNING": 1, "FAILED": 1, "COMPLETED": 1, "PENDING": 4}
    assert (told["tasks"][0]["task"], told["tasks"][0]["step"]) == ("5_0", 12)
    tool(tmp_path, "scontrol", f"echo '{lines[2]}'")
    assert cli(["slurm", "status", "5_0"]) == 0
    assert "attempt 2: step 12 of 912, loss 0.5000, accuracy 0.750" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "count"), [("4-7", 4), ("0", 1), ("1,3,5-9:2%4", 5), ("0-1000000", 1000001), ("x", 1)]
)
def test_tasks_are_counted(text: str, count: int) -> None:
    assert status.num_tasks(text) == count


WRONG: list[Any] = [None, "x", -1, 1e308, float("nan"), True, [], [1], {}, {"a": 1}, "\0", "1", 10**400, ""]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: repr(value)[:20])
def test_wrong_values_in_records_break_nothing(logs: Path, wrong: Any) -> None:
    """Each value of each record in turn: it shows less, and never ends in a traceback."""
    output = logs.parents[1] / "out"
    end = {"node": "b", "code": 1, "failed_at": 240.0, "time": 241.0, "reason": "rank 9 failed", "ranks": {}}
    (logs / "attempt-1" / "b.end.json").write_text(json.dumps(end))
    (logs / "attempt-1" / "c.end.json").write_text(json.dumps({**end, "node": "c"}))
    files = [output / "run" / "metrics.jsonl", output / "run" / "attempts.jsonl", output / "run" / "plan.json"]
    files += [logs / "events.jsonl", logs / "attempt-1" / "b.end.json", logs / "attempt-1" / "start.json"]
    for path in files:
        kept = path.read_text()
        last = kept.splitlines()[-1 if path.suffix == ".jsonl" and not kept.endswith('"lo') else 0]
        record = json.loads(last) if path.suffix == ".jsonl" else json.loads(kept)
        for name in record:
            changed = json.dumps({**record, name: wrong})
            path.write_text(f"{changed}\n" * 3 if path.suffix == ".jsonl" else changed)
            answer = status.summarise(TOLD, read_records(logs))
            assert status.as_text("7", answer) and json.dumps(answer)
        path.write_text(json.dumps(wrong))
        assert status.as_text("7", status.summarise({}, read_records(logs)))
        path.write_text(kept)
