"""Stopped and started again by Slurm: the end is that of a run that nobody disturbed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rm_scale.files import read_json_lines
from tests.support.cluster import CLI, Cluster, Job, template, until
from tests.support.launching import losses, read_lines

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

STEPS = 90
SETTINGS = ["--max_steps", str(STEPS), "--save_strategy", "steps", "--save_steps", "30", "--deepspeed", "zero2"]
SETTINGS += ["--num_train_epochs", "9", "--save_total_limit", "2"]
LIMIT = 3 * 60 * 60


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, inputs: list[str]) -> Path:
    """The same run in one attempt."""
    output = cluster.work / "undisturbed"
    job = cluster.submit("--nodes=2", template("1b"), *inputs, *SETTINGS, "--output_dir", str(output))
    assert cluster.wait(job, 900)["JobState"] == "COMPLETED", job.output()[-3000:]
    return output


def status(cluster: Cluster, job: Job) -> dict[str, object]:
    """What `rm-scale slurm status --json` says."""
    answer = cluster.run(*CLI, "slurm", "status", job.number, "--json")
    assert answer.code == 0, answer.output
    return dict(json.loads(answer.output))


def test_signalled_twice_it_ends_with_the_same_weights(cluster: Cluster, inputs: list[str], undisturbed: Path) -> None:
    """The signal is sent to the script, as --signal=B:USR1@GRACE does; that it comes is the next test's."""
    output = cluster.work / "disturbed"
    job = cluster.submit("--nodes=2", template("1b"), *inputs, *SETTINGS, "--output_dir", str(output))
    for attempt, step in ((0, 10), (1, 40)):
        until(lambda: (job.logs / f"attempt-{attempt}" / "start.json").exists(), 900, job.output)  # noqa: B023
        cluster.wait_for_step(output, step)
        assert cluster.run("scancel", "--batch", "--signal=USR1", job.number).code == 0
    shown = cluster.wait(job, 900)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "2"), job.output()[-3000:]
    assert losses(output) == losses(undisturbed), "every step once, with the same loss"
    assert (output / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    saved = [line["step"] for line in read_lines(output / "run" / "attempts.jsonl") if line["event"] == "saved"]
    assert saved == sorted(set(saved)), "no step was saved twice: nothing was lost and made again"
    told = status(cluster, job)
    to_requeue, to_step = told["signal_to_requeue_seconds"], told["start_to_first_resumed_step_seconds"]
    assert isinstance(to_requeue, list) and isinstance(to_step, list)
    print(f"\nseconds from signal to requeue {to_requeue}, from start to first resumed step {to_step}")
    assert len(to_requeue) == len(to_step) == 2 and max(to_requeue) < 30


def test_slurm_signals_before_the_time_limit(cluster: Cluster, inputs: list[str]) -> None:
    """Slurm's own signal, in the first minutes of a long job: before its first step or after it, as it happens."""
    output = cluster.work / "limited"
    job = cluster.submit(
        *["--nodes=1", f"--time={LIMIT // 60}", f"--signal=B:USR1@{LIMIT - 110}", template("7b"), *inputs],
        *["--max_steps", "2000", "--num_train_epochs", "999", "--save_strategy", "steps", "--save_steps", "1000"],
        *["--output_dir", str(output)],
    )
    # An attempt that is signalled while the job is still being prepared has nothing to save.
    until(lambda: saved_and_resumed(output) is not None, 900, job.output, 0.5)
    cluster.run("scancel", job.number)
    shown = cluster.wait(job)
    assert shown["JobState"] == "CANCELLED" and int(shown["Restarts"]) >= 1, "who cancels a job does not want it back"
    stopped, again = saved_and_resumed(output) or ({}, {})
    assert stopped["reason"] == "stopped: SIGUSR1" and again["restart_count"] == stopped["restart_count"] + 1
    assert again["step"] == stopped["step"]


def saved_and_resumed(output: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The end of the first attempt that made a step, and the start of the next."""
    events = read_json_lines(output / "run" / "attempts.jsonl")
    for place, event in enumerate(events):
        if event["event"] == "end" and event["step"] > 0:
            return next(((event, later) for later in events[place:] if later["event"] == "start"), None)
    return None


@pytest.mark.parametrize("partition", ["low", "spot"])
def test_a_more_important_job_takes_the_node(cluster: Cluster, inputs: list[str], partition: str) -> None:
    """Slurm's own preemption: SIGTERM to the tasks, a grace time, and a requeue, under CANCEL by the job itself."""
    if "high" not in cluster.run("sinfo", "--noheader", "--format", "%R").output.split():
        pytest.skip("the cluster has no partitions low, spot and high; that of make test-slurm has")
    output = cluster.work / f"preempted-{partition}"
    words = [*inputs, "--max_steps", "5000", "--num_train_epochs", "9999", "--output_dir", str(output)]
    job = cluster.submit("--nodes=1", f"--partition={partition}", template("7b"), *words)
    cluster.wait_for_step(output, 5)
    node = cluster.show(job)["NodeList"]
    other = cluster.submit("--partition=high", f"--nodelist={node}", "--exclusive", "--wrap=sleep 2")
    until(lambda: cluster.show(job).get("Restarts") == "1", 900, job.output, 0.5)
    cluster.wait_for_text(job, "resuming from", 60)
    cluster.run("scancel", job.number)
    assert cluster.wait(other)["JobState"] == "COMPLETED"
    attempts = read_lines(output / "run" / "attempts.jsonl")
    stopped = next(line for line in attempts if line["event"] == "end")
    assert stopped["reason"] in {"stopped: SIGTERM", "stopped: SIGUSR1"} and stopped["step"] >= 5
    again = next(line for line in attempts if line["event"] == "start" and line["restart_count"])
    assert again["step"] == stopped["step"]


def test_restarts_are_limited(cluster: Cluster, inputs: list[str]) -> None:
    output = cluster.work / "capped"
    words = [*inputs, "--max_steps", "5000", "--num_train_epochs", "9999", "--output_dir", str(output)]
    job = cluster.submit("--nodes=1", template("1b"), *words, env={"RM_SCALE_MAX_RESTARTS": "0"})
    cluster.wait_for_step(output, 3)
    (output / "STOP").touch()
    shown = cluster.wait(job)
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "85:0", "0")
    assert "not requeued" in job.output() and list(output.glob("checkpoint-*"))
