"""Inside a container there is no scontrol, squeue or scancel: a stand-in engine hides Slurm's commands."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, pid_of_rank, template, until
from tests.support.launching import read_json, read_lines

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

# What `apptainer exec` takes from us, in a mount namespace of its own in which Slurm's commands can't be run.
ENGINE = f"""#!/bin/bash
[[ $1 == exec ]] || exit 255
shift
while [[ $1 == --* ]]; do
    if [[ $1 == --bind ]]; then shift; fi
    shift
done
shift # the image
export PATH={Path(sys.executable).parent}:/usr/bin:/bin
exec unshare --mount bash -c '
    for name in /usr/bin/s{{acct,batch,cancel,control,info,queue,run}}; do
        if [[ -e $name ]]; then mount --bind /dev/null "$name"; fi
    done
    exec "$@"' engine "$@"
"""

ENDLESS = ["--max_steps", "5000", "--num_train_epochs", "9999"]


@pytest.fixture(scope="module")
def container(own_cluster: Cluster) -> dict[str, str]:
    """Variables of a job in a container."""
    if os.geteuid() != 0:
        pytest.skip("the stand-in engine mounts, which needs root")
    engine = own_cluster.work / "engine" / "apptainer"
    engine.parent.mkdir()
    engine.write_text(ENGINE)
    engine.chmod(0o755)
    return {"RM_SCALE_CONTAINER": "image.sif", "PATH": f"{engine.parent}:{own_cluster.env['PATH']}"}


def test_two_nodes_meet_stop_and_go_on(own_cluster: Cluster, inputs: list[str], container: dict[str, str]) -> None:
    cluster, output = own_cluster, own_cluster.work / "contained"
    words = ["--max_steps", "3000", "--num_train_epochs", "999", "--output_dir", str(output)]
    job = cluster.submit("--nodes=2", template("1b"), *inputs, *words, env=container)
    cluster.wait_for_step(output, 3)
    hidden = Path(f"/proc/{pid_of_rank(1, output)}/root/usr/bin/scontrol")
    assert not hidden.is_file(), "the engine hides Slurm's commands"
    assert cluster.run("scancel", "--batch", "--signal=USR1", job.number).code == 0
    until(lambda: cluster.show(job)["Restarts"] == "1", 900, job.output)
    saved = [line["step"] for line in read_lines(output / "run" / "attempts.jsonl") if line["event"] == "saved"]
    cluster.wait_for_step(output, saved[-1] + 2)
    cluster.run("scancel", job.number)
    cluster.wait(job)
    starts = [line["step"] for line in read_lines(output / "run" / "attempts.jsonl") if line["event"] == "start"]
    assert starts == [0, saved[-1]] and len(read_json(job.logs / "attempt-1" / "start.json")["nodes"]) == 2


def test_one_job_at_a_time_in_a_folder(own_cluster: Cluster, inputs: list[str], container: dict[str, str]) -> None:
    """A second one is refused while the first runs, and takes over from one that has ended without giving back."""
    cluster, output = own_cluster, own_cluster.work / "contained-once"
    words = [template("1b"), *inputs, "--output_dir", str(output)]
    first = cluster.submit("--nodes=1", "--nodelist=node1", *words, *ENDLESS, env=container)
    cluster.wait_for_step(output, 2)
    second = cluster.submit("--nodes=1", "--nodelist=node2", *words, *ENDLESS, env=container)
    assert (cluster.wait(second)["ExitCode"], first.number in second.output()) == ("2:0", True), second.output()
    assert f"job {first.number} is running and writes there" in second.output()
    os.kill(pid_of_rank(0, output), signal.SIGKILL)
    cluster.wait(first)
    assert (output / ".rm_scale_lock").exists()
    third = cluster.submit("--nodes=1", "--nodelist=node2", *words, *ENDLESS, env=container)
    cluster.wait_for_text(third, "taken over from a run that has ended")
    until(lambda: has_begun(output, third.number), 900, third.output)
    cluster.run("scancel", third.number)
    assert cluster.wait(third)["JobState"] == "CANCELLED"


def has_begun(output: Path, job: str) -> bool:
    """Whether a job trains there."""
    events = read_lines(output / "run" / "attempts.jsonl")
    return any(line["event"] == "first_step" and line["job_id"] == job for line in events)
