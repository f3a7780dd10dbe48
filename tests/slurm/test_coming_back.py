"""Jobs that come back: after short limits, slow saves, a controller that is away, crashes; and signals gone astray."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from rm_scale.files import read_json_lines
from rm_scale.training.preemption import attempt_signal
from tests.support.cluster import Cluster, Job, pid_of_rank, template, until
from tests.support.launching import read_json

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

ENDLESS = ["--max_steps", "5000", "--num_train_epochs", "9999", "--save_strategy", "steps", "--save_steps", "5"]
ENDLESS += ["--save_total_limit", "2"]


def events(output: Path, name: str) -> list[dict[str, Any]]:
    """The run's events of one kind, in order."""
    return [line for line in read_json_lines(output / "run" / "attempts.jsonl") if line["event"] == name]


def end(cluster: Cluster, job: Job) -> None:
    """Cancel a job that would go on."""
    cluster.run("scancel", job.number)
    assert cluster.wait(job)["JobState"] == "CANCELLED"


def wait_for_restart(cluster: Cluster, job: Job, count: int) -> None:
    until(lambda: cluster.show(job)["Restarts"] == str(count), 900, job.output, 0.5)


def test_a_short_limit_and_a_save_that_is_too_slow(cluster: Cluster, inputs: list[str]) -> None:
    """The script's grace is as long as the limit; the limit is moved; and in the end the ranks hang in their save."""
    output = cluster.work / "short"
    job = cluster.submit(
        *["--nodes=1", "--time=10", template("1b"), *inputs, *ENDLESS, "--output_dir", str(output)],
        env={"RM_SCALE_LIMIT_SECONDS": "3"},
    )
    cluster.wait_for_text(job, "before the limit of")
    cluster.wait_for_step(output, 7)
    assert cluster.show(job)["Restarts"] == "0", "it trains although it was signalled in its first minute"
    assert cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60").code == 0
    cluster.wait_for_text(job, "the time limit was moved")
    os.kill(pid_of_rank(0, output), signal.SIGSTOP)
    assert cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=1").code == 0
    wait_for_restart(cluster, job, 1)
    assert cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60").code == 0
    until(lambda: len(events(output, "first_step")) == 2, 900, job.output)
    assert events(output, "start")[1]["step"] == events(output, "saved")[-1]["step"] or len(events(output, "saved")) > 1
    assert events(output, "start")[1]["step"] >= 5, "since its last checkpoint"
    end(cluster, job)


def test_a_controller_that_is_away_and_a_signal_of_an_earlier_attempt(own_cluster: Cluster, inputs: list[str]) -> None:
    cluster, output = own_cluster, own_cluster.work / "away"
    job = cluster.submit("--nodes=1", template("1b"), *inputs, *ENDLESS, "--output_dir", str(output))
    cluster.wait_for_step(output, 3)
    cluster.fault("fault", "head", "slurmctld")
    try:
        (output / "STOP").touch()
        cluster.wait_for_text(job, "not requeued yet")
    finally:
        cluster.fault("heal", "head")
    wait_for_restart(cluster, job, 1)
    until(lambda: len(events(output, "first_step")) == 2, 900, job.output)
    # What the first attempt's script might have sent just before somebody requeued the job.
    assert cluster.run("scancel", f"--signal={attempt_signal(0)}", job.number).code == 0
    cluster.wait_for_step(output, events(output, "first_step")[1]["step"] + 20)
    assert cluster.run("scancel", f"--signal={attempt_signal(1)}", job.number).code == 0
    wait_for_restart(cluster, job, 2)
    assert len(events(output, "end")) == 2, "stopped by the signal of its own attempt"
    end(cluster, job)


def test_a_crash_after_progress_is_retried_on_another_node(own_cluster: Cluster, inputs: list[str]) -> None:
    cluster, output = own_cluster, own_cluster.work / "crashed"
    cluster.wait_until_idle()
    words = [template("1b"), *inputs, *ENDLESS, "--output_dir", str(output)]
    job = cluster.submit("--nodes=1", *words, env={"RM_SCALE_RETRIES": "1", "RM_SCALE_KILL_SECONDS": "1"})
    until(lambda: len(events(output, "saved")) >= 1, 900, job.output)
    os.kill(pid_of_rank(0, output), signal.SIGKILL)
    wait_for_restart(cluster, job, 1)
    bad = read_json(job.logs / "attempt-0" / "start.json")["nodes"][0]
    cluster.wait_for_text(job, f"{bad} is left out of the next attempts")
    until(lambda: len(events(output, "saved")) >= 2 and len(events(output, "first_step")) == 2, 900, job.output)
    assert bad not in read_json(job.logs / "attempt-1" / "start.json")["nodes"], job.output()
    os.kill(pid_of_rank(0, output), signal.SIGKILL)
    shown = cluster.wait(job)
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "137:0", "1"), "no retry is left"
