"""The disk of the logs is full in mid-training, and at the next start: nothing ends or hangs; the job comes back."""

from __future__ import annotations

import json
import os
import re

import pytest

from rm_scale.files import read_json_lines
from tests.support.cluster import Cluster, template, until
from tests.support.launching import read_lines

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

NODE = "node1"


def test_a_full_disk_of_the_logs(own_cluster: Cluster, inputs: list[str]) -> None:
    """Ranks' logs, the job's own and its records lie on it. Seen in the node, whose disk it is."""
    if os.geteuid() != 0:
        pytest.skip("the small disk is mounted, which needs root")
    cluster, output, disk = own_cluster, own_cluster.work / "full", own_cluster.work / "small disk"
    disk.mkdir()
    cluster.wait_until_idle()
    cluster.fault("hide", NODE, str(disk), "2m")
    fill = f"dd if=/dev/zero of='{disk}/filling' bs=4k oflag=append conv=notrunc 2>/dev/null"
    logs = f"'{disk}'/*.log '{disk}'/logs/*/*.jsonl '{disk}'/logs/*/*/*.log"
    fill += f'; for log in {logs}; do yes >>"$log"; done 2>/dev/null'  # to the end of their last pages

    def read(pattern: str) -> str:
        return cluster.inside(NODE, f"cat '{disk}'/{pattern}")

    def steps() -> int:
        lines = read_json_lines(output / "run" / "metrics.jsonl")
        return max((int(line["step"]) for line in lines if "loss" in line), default=0)

    words = ["--max_steps", "90000", "--num_train_epochs", "9999", "--output_dir", str(output)]
    job = cluster.submit(
        *["--nodes=1", f"--nodelist={NODE}", f"--output={disk}/job.log", template("1b"), *inputs, *words],
        env={"RM_SCALE_RANKS_PER_NODE": "2", "RM_SCALE_LOGS": str(disk / "logs")},
    )
    cluster.wait_for_step(output, 3)
    cluster.inside(NODE, fill)
    reached = steps()
    until(lambda: steps() > reached + 700, 900, lambda: read("job.log"))  # far more than a pipe holds
    cluster.inside(NODE, f"rm '{disk}/filling'")
    until(lambda: f"step {reached + 600}]" in read("logs/*/attempt-0/*.rank0.log"), 900, lambda: read("job.log"))
    until(lambda: "lines are missing here" in read("job.log"), 900, lambda: read("job.log"))
    cluster.inside(NODE, fill)
    (output / "STOP").touch()
    until(lambda: cluster.show(job)["Restarts"] == "1", 900, lambda: read("job.log"))

    def is_preparing() -> bool:
        return bool(cluster.inside(NODE, f"pgrep -f 'slurm[.]prepare {disk}/logs/[^ ]*/attempt-1'").strip())

    # The disk is still full when the next attempt begins, which tries again until there is room.
    for _ in range(2):
        until(is_preparing, 900, lambda: str(cluster.show(job)))
        until(lambda: not is_preparing(), 900, lambda: str(cluster.show(job)))
    cluster.inside(NODE, f"rm '{disk}/filling'")
    until(lambda: len(firsts(output)) == 2, 900, lambda: read("job.log"))
    cluster.run("scancel", job.number)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    assert firsts(output)[1] > reached + 700, "it went on from where it was stopped"
    numbers = [line["step"] for line in read_lines(output / "run" / "metrics.jsonl") if "loss" in line]
    assert numbers == list(range(1, len(numbers) + 1))
    cluster.fault("show", NODE, str(disk))


def test_a_full_disk_of_the_run(own_cluster: Cluster, inputs: list[str]) -> None:
    """Records and checkpoints wait for room, the last one, which the job is to stop with, too."""
    if os.geteuid() != 0:
        pytest.skip("the small disk is mounted, which needs root")
    cluster, disk = own_cluster, own_cluster.work / "output disk"
    disk.mkdir()
    cluster.wait_until_idle()
    cluster.fault("hide", NODE, str(disk), "24m")
    words = ["--max_steps", "90000", "--num_train_epochs", "9999", "--output_dir", str(disk / "run")]
    words += ["--save_strategy", "steps", "--save_steps", "5", "--save_total_limit", "2", "--max_failed_saves", "1000"]
    job = cluster.submit("--nodes=1", f"--nodelist={NODE}", template("1b"), *inputs, *words)

    def events(name: str) -> list[int]:
        text = cluster.inside(NODE, f"cat '{disk}/run/run/attempts.jsonl'")
        found = [json.loads(line) for line in text.splitlines()]
        return [int(line["step"]) for line in found if line["event"] == name]

    until(lambda: len(events("saved")) >= 1, 900, job.output)
    cluster.inside(NODE, f"dd if=/dev/zero of='{disk}/filling' bs=4k 2>/dev/null")
    cluster.wait_for_text(job, "could not be written (1 of 1000 that may fail in a row)")
    cluster.wait_for_text(job, "metrics.jsonl")
    before = last_step(job.output())
    until(lambda: last_step(job.output()) > before + 50, 900, job.output)
    assert cluster.run("scancel", "--batch", "--signal=USR1", job.number).code == 0
    cluster.wait_for_text(job, "next try in")
    cluster.inside(NODE, f"rm '{disk}/filling'")
    until(lambda: cluster.show(job)["Restarts"] == "1", 900, job.output)
    until(lambda: len(events("first_step")) == 2, 900, job.output)
    cluster.run("scancel", job.number)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    assert events("start")[1] > before + 50, "nothing is lost"
    text = cluster.inside(NODE, f"cat '{disk}/run/run/metrics.jsonl'")
    numbers = [line["step"] for line in map(json.loads, text.splitlines()) if "loss" in line]
    assert numbers == list(range(1, len(numbers) + 1))
    cluster.fault("show", NODE, str(disk))


def last_step(log: str) -> int:
    """The last step that a job's log tells of."""
    return max((int(step) for step in re.findall(r"step (\d+)\]", log)), default=0)


def firsts(output: os.PathLike[str]) -> list[int]:
    """The first step of each attempt."""
    events = read_json_lines(f"{output}/run/attempts.jsonl")
    return [int(line["step"]) for line in events if line["event"] == "first_step"]
