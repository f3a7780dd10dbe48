"""Limits that are moved, owners who cancel, and attempts that hang before training begins."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rm_scale.files import read_json_lines
from tests.support.cluster import Cluster, Job, template, until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

ENDLESS = ["--max_steps", "5000", "--num_train_epochs", "9999", "--save_strategy", "steps", "--save_steps", "5"]
ENDLESS += ["--save_total_limit", "2"]


def setup_file(folder: Path, code: str) -> dict[str, str]:
    """Have a job's script run this before it prepares the attempt."""
    path = folder / "setup.sh"
    path.write_text(f"{code}\n")
    return {"RM_SCALE_SETUP": str(path)}


def test_who_cancels_after_the_limit_was_extended_does_not_want_the_job_back(
    own_cluster: Cluster, inputs: list[str]
) -> None:
    """The end with which an attempt began decided: what was cancelled after it counted as ended by the limit."""
    cluster, output = own_cluster, own_cluster.work / "extended"
    began = time.time()
    env = setup_file(cluster.work, 'scontrol update JobId="$SLURM_JOB_ID" TimeLimit=60')
    # Slurm sets the last one itself from 23.02 on.
    env |= {"RM_SCALE_LIMIT_SECONDS": "2", "SLURM_JOB_END_TIME": str(int(began) + 60)}
    words = [template("1b"), *inputs, *ENDLESS, "--output_dir", str(output)]
    job = cluster.submit("--nodes=1", "--time=1", *words, env=env)
    cluster.wait_for_text(job, "the time limit was moved")
    known = (job.logs / "attempt-0" / "end_time").read_text()
    assert int(known) > began + 1800
    cluster.wait_for_step(output, 3)
    cluster.fault("fault", "head", "slurmctld")
    try:
        time.sleep(15)  # several looks, which nobody answers
    finally:
        cluster.fault("heal", "head")
    assert (job.logs / "attempt-0" / "end_time").read_text() == known
    until(lambda: time.time() > began + 75, 120, job.output)
    cluster.run("scancel", job.number)
    shown = cluster.wait(job)
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0"), job.output()[-3000:]
    assert job.output().count("the time limit was moved") == 1


def test_a_start_that_hangs_ends_after_three_attempts(cluster: Cluster, inputs: list[str]) -> None:
    """Stopped by signals, and by the limit: no rank had begun, so training's own guard knew nothing of it."""
    output = cluster.work / "hanging"
    env = setup_file(
        cluster.work, f"until [[ -e '{cluster.work}'/go-${{SLURM_RESTART_COUNT:-0}} ]]; do sleep 0.2; done"
    )
    words = [template("1b"), *inputs, *ENDLESS, "--output_dir", str(output)]
    job = cluster.submit("--nodes=1", "--time=60", *words, env=env)
    for attempt in (0, 1):
        until(lambda: events(job, "attempt") == attempt + 1, 900, job.output)  # noqa: B023
        until(lambda: signalled(cluster, job, attempt), 900, job.output, 1.0)  # noqa: B023
        (cluster.work / f"go-{attempt}").touch()
        until(lambda: cluster.show(job)["Restarts"] == str(attempt + 1), 900, job.output, 0.5)  # noqa: B023
    until(lambda: events(job, "attempt") == 3, 900, job.output)
    assert cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=1").code == 0
    shown = cluster.wait(job)
    assert (shown["JobState"], shown["Restarts"]) == ("TIMEOUT", "2"), job.output()[-3000:]
    assert "the last 3 attempts were stopped before training began" in job.output()
    assert events(job, "idle") == 3 and not (output / "run" / "attempts.jsonl").exists()


def events(job: Job, name: str) -> int:
    """How often an event was noted."""
    return sum(event["event"] == name for event in read_json_lines(job.logs / "events.jsonl"))


def signalled(cluster: Cluster, job: Job, attempt: int) -> bool:
    """Signal the script again; return whether that counted. The first one comes early for a limit of an hour."""
    if events(job, "signal") <= attempt:
        cluster.run("scancel", "--batch", "--signal=USR1", job.number)
    return events(job, "signal") > attempt
