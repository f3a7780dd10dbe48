"""Nodes that are lost in mid-training: Slurm starts the job again elsewhere, and the run ends as it would have."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster, Job, pid_of_rank, template, until
from tests.support.launching import losses, read_json, read_lines

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

STEPS, EVERY = 100, 20
SETTINGS = ["--max_steps", str(STEPS), "--save_strategy", "steps", "--save_steps", str(EVERY), "--deepspeed", "zero2"]
SETTINGS += ["--num_train_epochs", "9", "--save_total_limit", "2"]


@pytest.fixture(scope="module")
def undisturbed(own_cluster: Cluster, inputs: list[str]) -> Path:
    """The same run on healthy nodes."""
    output = own_cluster.work / "healthy"
    job = own_cluster.submit("--nodes=2", template("1b"), *inputs, *SETTINGS, "--output_dir", str(output))
    assert own_cluster.wait(job, 900)["JobState"] == "COMPLETED", job.output()[-3000:]
    return output


@pytest.mark.parametrize("fault", ["power", "slurmd", "link"])
def test_a_lost_node_costs_what_came_after_the_checkpoint(
    own_cluster: Cluster, inputs: list[str], undisturbed: Path, fault: str
) -> None:
    cluster, output = own_cluster, own_cluster.work / fault
    cluster.wait_until_idle()
    job = cluster.submit("--nodes=2", template("1b"), *inputs, *SETTINGS, "--output_dir", str(output))
    cluster.wait_for_step(output, EVERY + 3)
    lost = _second_node(cluster, job)
    if fault == "slurmd":
        # Else the step, which outlives its slurmd, would have finished the run before Slurm has noticed.
        os.kill(pid_of_rank(1, output), signal.SIGSTOP)
    cluster.fault("fault", lost, fault)
    try:
        until(lambda: cluster.show(job).get("Restarts") == "1", 900, job.output, 0.5)
        if fault in {"link", "slurmd"}:
            _old_tasks_end(job, lost)
        shown = cluster.wait(job, 900)
        assert shown["JobState"] == "COMPLETED", job.output()[-3000:]
        assert lost not in read_json(job.logs / "attempt-1" / "start.json")["nodes"]
    finally:
        cluster.fault("heal", lost)
    assert losses(output) == losses(undisturbed)
    assert (output / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    starts = [line["step"] for line in read_lines(output / "run" / "attempts.jsonl") if line["event"] == "start"]
    assert len(starts) == 2 and starts[1] >= EVERY and starts[1] % EVERY == 0


def _second_node(cluster: Cluster, job: Job) -> str:
    """A node that the job's script does not run on."""
    return str(read_json(job.logs / "attempt-0" / "start.json")["nodes"][1])


def _old_tasks_end(job: Job, node: str) -> None:
    """The node that was given up still runs, and sees on the disk that it has been replaced."""
    end = job.logs / "attempt-0" / f"{node}.end.json"
    until(end.exists, 60, lambda: f"{node} goes on beside the new attempt")
    assert "attempt 1 has begun elsewhere" in read_json(end)["reason"]


def test_two_attempts_never_write_at_once(own_cluster: Cluster, inputs: list[str]) -> None:
    """A run on one node that loses its network, not its disk: it trains and saves on until the next attempt begins."""
    cluster, output = own_cluster, own_cluster.work / "split"
    cluster.wait_until_idle()
    words = ["--max_steps", "3000", "--num_train_epochs", "999", "--save_strategy", "steps", "--save_steps", "50"]
    job = cluster.submit(
        "--nodes=1", template("1b"), *inputs, *words, "--save_total_limit", "3", "--output_dir", str(output)
    )
    cluster.wait_for_step(output, 20)
    lost = str(read_json(job.logs / "attempt-0" / "start.json")["nodes"][0])
    cluster.fault("fault", lost, "link")
    try:
        until((job.logs / "attempt-1" / "start.json").exists, 900, job.output)
        _old_tasks_end(job, lost)
        attempts = output / "run" / "attempts.jsonl"
        until(lambda: _event(attempts, "first_step", 1) != {}, 900, job.output)
        cluster.run("scancel", job.number)
        cluster.wait(job)
    finally:
        cluster.fault("heal", lost)
    began = _event(attempts, "start", 1)
    assert began["step"] > 50, "the old attempt went on saving after it had been cut off"
    steps = [line["step"] for line in read_lines(output / "run" / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)), "each step once, whoever made it"
    late = [line for line in read_lines(attempts) if line["restart_count"] == 0 and line["time"] > began["time"]]
    assert late == [], "the old attempt wrote after the new one had begun"


def _event(attempts: Path, name: str, restart: int) -> dict[str, Any]:
    """An event of a job's attempt, empty while it has not happened."""
    found = (line for line in read_lines(attempts) if line["event"] == name and line["restart_count"] == restart)
    return next(found, {})
