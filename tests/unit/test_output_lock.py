"""One run at a time writes to an output directory, whatever became of the one before."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from rm_scale import output_lock
from rm_scale.errors import UserError
from rm_scale.output_lock import LOCK_FILE, Owner, may_run, running_owner, this_process, writing_alone

ME = Owner("node1", os.getpid(), output_lock._start_of(os.getpid()) or 0, "boot1", "machine1", "pid:[1]")
PARENT = replace(ME, pid=os.getppid(), started=output_lock._start_of(os.getppid()) or 0)


def write_lock(folder: Path, owner: Owner) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / LOCK_FILE
    path.write_text(json.dumps(asdict(owner)))
    return path


def other_run(**changes: object) -> Owner:
    """A process that runs on this machine and is not this one."""
    parent = {"pid": os.getppid(), "started": output_lock._start_of(os.getppid()) or 0}
    return replace(this_process({}), **{**parent, **changes})  # type: ignore[arg-type]


def test_it_is_held_for_the_block_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "out"
    for _ in range(2):  # several runs of one process, one after the other
        with writing_alone(folder):
            owner = Owner(**json.loads((folder / LOCK_FILE).read_text()))
            assert (owner.pid, owner.started) == (os.getpid(), output_lock._start_of(os.getpid()))
            assert running_owner(folder) is None, "this process itself"
        assert not (tmp_path / "a").exists()
    with pytest.raises(ZeroDivisionError), writing_alone(folder):
        (folder / "model").write_text("x")
        _ = 1 / 0
    assert [path.name for path in folder.iterdir()] == ["model"]


def test_a_run_that_is_alive_is_named(tmp_path: Path) -> None:
    path = write_lock(tmp_path / "out", other_run(since="2024-05-06 07:08:09"))
    before = path.read_bytes()
    with pytest.raises(UserError) as caught, writing_alone(tmp_path / "out"):
        pass
    said = str(caught.value)
    host = this_process().host
    assert f"another run writes there (process {os.getppid()} on {host}, since 2024-05-06 07:08:09)" in said
    assert f"Fix: another --output_dir, or kill {os.getppid()} on {host}." in said and f"rm {path}" in said
    assert path.read_bytes() == before


def test_a_run_of_this_very_process_is_alive(tmp_path: Path) -> None:
    found: list[BaseException] = []

    def second() -> None:
        try:
            with writing_alone(tmp_path / "out"):
                pass
        except UserError as error:
            found.append(error)

    with writing_alone(tmp_path / "out"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert len(found) == 1 and (tmp_path / "out" / LOCK_FILE).exists()


def test_a_killed_run_s_lock_is_taken_over(tmp_path: Path) -> None:
    for ended in (other_run(started=1), other_run(pid=2**22 + 5), replace(this_process({}), since="before")):
        write_lock(tmp_path / "out", ended)
        with writing_alone(tmp_path / "out"):
            assert json.loads((tmp_path / "out" / LOCK_FILE).read_text())["pid"] == os.getpid()
        assert list((tmp_path / "out").iterdir()) == []


def test_who_runs_as_far_as_one_can_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_lock, "_job_may_run", lambda owner: owner.job == 6)
    assert may_run(PARENT, ME) and not may_run(replace(PARENT, started=1), ME)
    assert not may_run(replace(PARENT, boot="boot0"), ME), "the machine was started anew"
    assert may_run(replace(PARENT, boot="boot0", machine=""), ME), "or it is another one of that name"
    assert may_run(replace(PARENT, started=1, namespace="pid:[2]"), ME), "a container, whose processes don't show here"
    assert may_run(replace(PARENT, host="node2"), ME), "another machine"
    job = replace(PARENT, host="node2", job=7)
    for mine, theirs, runs in (
        (replace(ME, job=7, attempt=1), job, False),  # requeued, on another node
        (replace(ME, job=7), job, True),  # two steps of one job
        (replace(ME, job=7, attempt=1), replace(PARENT, job=7), False),  # requeued, on the same node
        (replace(ME, job=8), job, False),  # Slurm says that it has ended
        (replace(ME, job=8), replace(job, job=6), True),
        (ME, replace(job, job=6), True),
        (ME, replace(job, cluster="other"), True),
    ):
        assert may_run(theirs, mine) is runs, (mine, theirs)


def test_what_squeue_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue = tmp_path / "squeue"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for script, runs in (
        ("echo 6", True),
        ("true", False),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", True),
    ):
        squeue.write_text(f"#!/bin/sh\n{script}\n")
        squeue.chmod(0o755)
        assert output_lock._job_may_run(replace(PARENT, job=6)) is runs, script
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert output_lock._job_may_run(replace(PARENT, job=6)), "it can't be told"


def test_what_was_asked_outside_the_container_holds_for_one_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that was pending when it was asked for may have been started again, and taken its lock anew."""
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setenv("RM_SCALE_JOB_ASKED", "6 0")
    monkeypatch.setenv("RM_SCALE_JOB_ENDED", "1")
    theirs = other_run(host="elsewhere", job=6)
    again = write_lock(tmp_path / "again", replace(theirs, attempt=1))
    with pytest.raises(UserError, match="job 6 is running and writes there"), writing_alone(again.parent):
        pass
    assert again.exists()
    with writing_alone(write_lock(tmp_path / "ended", theirs).parent):
        pass


def test_a_task_of_an_array_is_named_alone(tmp_path: Path) -> None:
    """The task that starts last has the number of the whole array, which scancel would end."""
    task = this_process({"SLURM_JOB_ID": "100", "SLURM_ARRAY_JOB_ID": "100", "SLURM_ARRAY_TASK_ID": "2"})
    assert (task.job, task.task) == (100, "100_2")
    write_lock(tmp_path, replace(task, host="elsewhere", cluster="another"))
    with pytest.raises(UserError) as caught, writing_alone(tmp_path):
        pass
    said = str(caught.value)
    assert "job 100_2 is running" in said and ", Slurm job 100_2, " in said
    assert "or scancel 100_2, or --dependency=afterany:100_2. If" in said


def test_a_lock_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    written = asdict(other_run())
    del written["task"]
    (tmp_path / LOCK_FILE).write_text(json.dumps(written))
    assert running_owner(tmp_path) == other_run(since=written["since"])


def test_a_lock_that_can_not_be_read_counts_as_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_lock, "_HALF_WRITTEN_SECONDS", 0.0)
    (tmp_path / LOCK_FILE).write_text("{half")
    with (
        pytest.raises(UserError, match=rf"its {LOCK_FILE} can't be read. .*If you know .*: rm"),
        writing_alone(tmp_path),
    ):
        pass


def test_another_s_new_lock_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two find the same old lock; the slower one must not remove what the faster one has made."""
    path = write_lock(tmp_path / "out", other_run(started=1))
    rename = Path.rename

    def beaten(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        self.unlink()
        write_lock(tmp_path / "out", other_run())
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", beaten)
    with pytest.raises(UserError, match="another run writes there"), writing_alone(tmp_path / "out"):
        pass
    assert json.loads(path.read_text())["pid"] == os.getppid()
    assert [file.name for file in path.parent.iterdir()] == [LOCK_FILE]


def test_a_lock_that_is_made_while_the_old_one_is_judged_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner gave the old one back in the seconds that Slurm took to answer, and another run has begun."""
    path = write_lock(tmp_path / "out", other_run(started=1))
    judge = may_run

    def beaten(owner: Owner, me: Owner) -> bool:
        answer = judge(owner, me)
        if owner.started == 1:
            write_lock(tmp_path / "out", other_run())
        return answer

    monkeypatch.setattr(output_lock, "may_run", beaten)
    with pytest.raises(UserError, match="another run writes there"), writing_alone(tmp_path / "out"):
        pass
    assert json.loads(path.read_text())["pid"] == os.getppid()


TAKES = """
import sys, time
from rm_scale.errors import UserError
from rm_scale.output_lock import writing_alone
print("ready", flush=True)
sys.stdin.readline()
try:
    with writing_alone(sys.argv[1]):
        print("held", flush=True)
        sys.stdin.readline()
except UserError as error:
    print("refused" if "another run writes there" in str(error) else str(error), flush=True)
    sys.stdin.readline()
"""


def test_of_many_that_find_a_stale_lock_one_takes_it(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    command = [sys.executable, "-c", TAKES, str(folder)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    for _ in range(2):
        write_lock(folder, other_run(started=1))
        started: list[Any] = [subprocess.Popen(command, **pipes) for _ in range(5)]
        said = [process.stdout.readline().strip() for process in started]
        for process in started:
            process.stdin.write("go\n")
        answers = sorted(process.stdout.readline().strip() for process in started)
        for process in started:
            process.communicate("end\n", timeout=60)
        assert said == ["ready"] * 5 and answers == ["held", *["refused"] * 4]
        assert list(folder.iterdir()) == []


def test_a_stale_lock_is_looked_at_by_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the move of a newer lock and its return a third process would take the name."""
    folder = tmp_path / "out"
    write_lock(folder, other_run(started=1))
    results: list[str] = []

    def take() -> None:
        with writing_alone(folder):
            results.append("held")

    for seconds, waits in ((60.0, True), (0.0, False)):
        monkeypatch.setattr(output_lock, "_GUARD_SECONDS", seconds)
        results.clear()
        write_lock(folder, other_run(started=1))
        with (folder / f"{LOCK_FILE}.guard").open("w") as looked_at:
            fcntl.flock(looked_at, fcntl.LOCK_EX)
            thread = threading.Thread(target=take)
            thread.start()
            thread.join(0.5 if waits else 60.0)
            assert results == ([] if waits else ["held"]), "it does not wait for ever"
        thread.join(60.0)
        assert results == ["held"]
        assert [path.name for path in folder.iterdir()] == ([] if waits else [f"{LOCK_FILE}.guard"])


def test_without_such_holds_a_stale_lock_is_taken_over_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", missing)
    write_lock(tmp_path / "out", other_run(started=1))
    with writing_alone(tmp_path / "out"):
        assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_FILE]


def test_a_directory_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused = pytest.raises(UserError, match=r"output_dir=.*: a part of this path is a file, not a folder")
    with refused, writing_alone(tmp_path / "file" / "out"):
        pass


def test_training_itself_holds_it(
    tiny_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rm_scale import training_run
    from rm_scale.train import main

    output = tmp_path / "out"
    held: list[bool] = []

    def stop(*_: object) -> None:
        held.append((output / LOCK_FILE).exists())
        raise UserError("far enough")

    monkeypatch.setattr(training_run, "load_text_encoder", stop)
    words = ["--model_name_or_path", str(tiny_model), "--dataset_path", str(pairs_file), "--output_dir", str(output)]
    assert main([*words, "--bf16", "false"]) == 2 and held == [True] and not output.exists()
    lock = write_lock(output, other_run())
    for more in ([], ["--resume_from_checkpoint", "auto"], ["--force", "overwrite"], ["--dry_run"]):
        capsys.readouterr()
        assert main([*words, "--bf16", "false", *more]) == 2
        assert "another run writes there" in capsys.readouterr().err
    assert held == [True] and [path.name for path in output.iterdir()] == [LOCK_FILE]
    write_lock(output, other_run(started=1))
    assert main([*words, "--bf16", "false"]) == 2 and held == [True, True], "a killed run's lock is no file of a run"
    assert not lock.exists()


def test_a_finished_run_leaves_no_lock(full_run: Path) -> None:
    assert not (full_run / LOCK_FILE).exists()
