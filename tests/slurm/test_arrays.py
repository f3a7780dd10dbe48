"""Tasks of an array are jobs of their own: each is stopped, requeued and cancelled alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from rm_scale.files import read_json_lines
from tests.support.cluster import Cluster, template, until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

ENDLESS = ["--max_steps", "5000", "--num_train_epochs", "9999"]


def test_each_task_is_stopped_alone(cluster: Cluster, inputs: list[str]) -> None:
    """The task that starts last has the number of the whole array as its SLURM_JOB_ID."""
    output = cluster.work / "array"
    array = cluster.submit(
        "--array=0-2", "--nodes=1", "--job-name=array", template("1b"), *inputs, *ENDLESS, "--output_dir", str(output)
    )
    tasks = [f"{array.number}_{number}" for number in range(3)]
    numbers = [cluster.show(task)["JobId"] for task in tasks]
    assert array.number in numbers, "one of them is the array to Slurm"
    for number in range(3):
        cluster.wait_for_step(output / f"task-{number}", 2)
    for stopped in range(3):
        assert cluster.run("scancel", "--batch", "--signal=USR1", tasks[stopped]).code == 0
        until(lambda: cluster.show(tasks[stopped])["Restarts"] == "1", 900, lambda: log(cluster, numbers[stopped]))  # noqa: B023
        restarts = [cluster.show(task)["Restarts"] for task in tasks]
        assert restarts == ["1"] * (stopped + 1) + ["0"] * (2 - stopped), "its siblings go on"
    for number in range(3):
        until(lambda: resumed(output / f"task-{number}"), 900, lambda: log(cluster, numbers[number]))  # noqa: B023
    for number, task in enumerate(tasks):
        cluster.run("scancel", task)
        states = [cluster.show(other)["JobState"] for other in tasks]
        assert not {"CANCELLED", "FAILED"} & set(states[number + 1 :]), "one is cancelled alone as well"
    for number in numbers:
        events = read_json_lines(cluster.work / "logs" / number / "events.jsonl")
        heard = [line["signal"] for line in events if line["event"] == "signal" and line["attempt"] == 0]
        assert heard == ["USR1"], "once, and by us"


def resumed(output: Path) -> bool:
    """Whether the second attempt goes on from where the first was stopped."""
    starts = [line for line in read_json_lines(output / "run" / "attempts.jsonl") if line["event"] == "start"]
    return len(starts) == 2 and starts[1]["step"] >= 2


def log(cluster: Cluster, number: str) -> str:
    """The end of a task's log."""
    found = next(cluster.work.glob(f"*-{number}.log"), None)
    return found.read_text(errors="replace")[-3000:] if found else "no log"
