"""What can't work is refused by one clear message, before anything is trained."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rm_scale.slurm.rendezvous import FIRST_PORT, NUM_PORTS
from rm_scale.tiers import model_tier
from tests.support.cluster import CLI, Cluster, Job, pid_of_rank, template
from tests.support.launching import run
from tests.support.memory_group import memory_group

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


def refused(cluster: Cluster, job: Job, code: str = "2:0") -> str:
    """The log of a job that must have been refused."""
    shown = cluster.wait(job)
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", code), job.output()[-3000:]
    assert code != "2:0" or "Traceback" not in job.output()
    return job.output()


def test_no_slurm_here(tmp_path: Path) -> None:
    """Neither the script nor the command needs a cluster to say so."""
    done = run(["bash", template("13b")])
    assert done.code == 2 and "no job around it. Fix: sbatch" in done.output
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "env"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    done = run([*CLI, "slurm", "submit", "--tier", "1b"], env={**os.environ, "PATH": str(tools)})
    assert done.code == 2 and "there is no Slurm here" in done.output


def test_settings_allocation_and_plan(cluster: Cluster, inputs: list[str]) -> None:
    """Wrong settings, more ranks than a step has groups, no GPUs, and a model that does not fit, side by side."""
    words = [*inputs, "--output_dir", str(cluster.work / "refused")]
    misspelt = cluster.submit("--nodes=1", template("1b"), *words, "--max_stepz", "3")
    crowded = cluster.submit("--nodes=1", template("1b"), *words, env={"RM_SCALE_RANKS_PER_NODE": "17"})
    without = cluster.submit("--nodes=1", template("7b"), *words, env={"RM_SCALE_DEVICE": "auto"})
    assert "did you mean max_steps?" in refused(cluster, misspelt)
    assert "every rank needs a group in each step. Fix: --global_batch_size 17" in refused(cluster, crowded)
    assert "8 GPUs per node, and nvidia-smi shows none" in refused(cluster, without)
    folder = cluster.work / "huge"
    folder.mkdir()
    (folder / "config.json").write_text(_shape_13b())
    huge = cluster.submit("--nodes=1", template("1b"), *words, "--model_name_or_path", str(folder))
    assert "GB per device, and there are" in refused(cluster, huge)
    assert not (cluster.work / "refused").exists()


def test_a_tier_beside_a_model_of_another_size(cluster: Cluster, inputs: list[str]) -> None:
    """A configuration's model counts before the script's; who names a tier beside it has meant one of the two."""
    config = cluster.work / "own.yaml"
    model = inputs[inputs.index("--model_name_or_path") + 1]
    config.write_text(f"model_name_or_path: {model}\n")
    rest = [word for word in inputs if word not in ("--model_name_or_path", model)]
    words = ["--config", str(config), *rest, "--output_dir", str(cluster.work / "tier")]
    queued = cluster.run("squeue", "--noheader", "--format", "%i").output
    for command in (["slurm", "submit"], ["slurm", "render"], ["launch", "--slurm", "--gpu", "cpu"]):
        done = cluster.run(*CLI, *command, "--tier", "13b", *words)
        assert done.code == 2 and "a model of tier 1b. Fix: --tier 1b, or name another" in done.output, done.output
    assert cluster.run("squeue", "--noheader", "--format", "%i").output == queued
    job = cluster.submit("--nodes=1", template("13b"), *words, "--dry_run")
    assert cluster.wait(job)["ExitCode"] == "0:0", job.output()[-3000:]
    assert "a model of tier 1b, and this job's script asks for what tier 13b takes" in job.output()
    assert f"--config {config}" in job.output() and "full training of 12.85B" not in job.output()
    assert f"--model_name_or_path {model_tier('13b').model}" not in job.output()


def test_a_job_of_several_parts(cluster: Cluster) -> None:
    job = cluster.submit("--nodes=1", ":", "--nodes=1", template("1b"))
    assert "SLURM_HET_SIZE=2: a heterogeneous job" in refused(cluster, job)


def _shape_13b() -> str:
    return json.dumps(model_tier("13b").config)


def test_a_disk_that_is_not_shared(own_cluster: Cluster, inputs: list[str]) -> None:
    cluster, folder = own_cluster, own_cluster.work / "private"
    folder.mkdir()
    for node in ("node1", "node2", "node3", "node4"):
        cluster.fault("hide", node, str(folder))
    job = cluster.submit("--nodes=2", template("1b"), *inputs, "--output_dir", str(folder / "run"))
    log = refused(cluster, job)
    assert "output_dir=" in log and "can't see what node" in log and "All nodes must share it" in log


def test_a_node_that_is_out_of_reach(own_cluster: Cluster, inputs: list[str]) -> None:
    """Slurm still counts it as idle: it has been silent for a moment only."""
    cluster = own_cluster
    cluster.wait_until_idle()
    cluster.fault("fault", "node2", "link")
    try:
        job = cluster.submit(
            *["--nodes=2", "--nodelist=node1,node2", "--no-requeue", template("1b"), *inputs],
            *["--output_dir", str(cluster.work / "unreached")],
            env={"RM_SCALE_CHECK_SECONDS": "8"},
        )
        shown = cluster.wait(job, 900)
        assert shown["JobState"] in {"FAILED", "NODE_FAIL"}
        assert "node2" in job.output(), job.output()[-3000:]
    finally:
        cluster.fault("heal", "node2")


def test_an_output_directory_that_another_job_writes_to(cluster: Cluster, inputs: list[str]) -> None:
    output = cluster.work / "taken"
    words = [*inputs, "--max_steps", "5000", "--num_train_epochs", "9999", "--output_dir", str(output)]
    first = cluster.submit("--nodes=1", template("1b"), *words)
    cluster.wait_for_step(output, 1)  # by then it has taken the directory's lock
    second = cluster.submit("--nodes=1", template("1b"), *words)
    log = refused(cluster, second)
    cluster.run("scancel", first.number)
    assert f"job {first.number} is running and writes there (process " in log and "Fix: another --output_dir" in log
    assert cluster.wait(first)["JobState"] == "CANCELLED"


def test_an_output_directory_of_another_run(cluster: Cluster, inputs: list[str]) -> None:
    """Its checkpoint is not continued by a run that would come to something else."""
    output = cluster.work / "other"
    words = [*inputs, "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--output_dir", str(output)]
    first = cluster.submit("--nodes=1", template("1b"), *words)
    assert cluster.wait(first)["JobState"] == "COMPLETED", first.output()[-2000:]
    second = cluster.submit("--nodes=1", template("7b"), *words, "--seed", "7", "--learning_rate", "1e-5")
    log = refused(cluster, second)
    assert "seed" in log and "learning_rate" in log and "allow_changed" in log


def test_a_port_that_is_taken(cluster: Cluster, inputs: list[str]) -> None:
    """The next one is used, and said."""
    from rm_scale.slurm.rendezvous import port_of_job

    with socket.socket() as taken:
        taken.bind(("", FIRST_PORT + 700 % NUM_PORTS))
        assert port_of_job(100) == FIRST_PORT + 701


def test_a_failed_rank_is_named_and_its_code_is_the_jobs(own_cluster: Cluster, inputs: list[str]) -> None:
    cluster, output = own_cluster, own_cluster.work / "killed"
    words = ["--max_steps", "5000", "--num_train_epochs", "9999", "--output_dir", str(output)]
    job = cluster.submit("--nodes=2", template("1b"), *inputs, *words, env={"RM_SCALE_KILL_SECONDS": "5"})
    cluster.wait_for_step(output, 3)
    os.kill(pid_of_rank(1, output), 9)
    log = refused(cluster, job, "137:0")
    assert "rank 1 was killed (signal 9) by somebody, or by something that left no sign" in log, "nobody is blamed"
    told = cluster.run(*CLI, "slurm", "status", job.number)
    assert "rank 1 was killed" in told.output and "FAILED" in told.output


def test_the_out_of_memory_killer_is_named_where_it_was(own_cluster: Cluster, inputs: list[str]) -> None:
    """A job with a limit of memory, in which something needs more; the kernel is told to choose the rank."""
    cluster, output, venv = own_cluster, own_cluster.work / "hungry", own_cluster.work / "limited"
    (venv / "bin").mkdir(parents=True)
    with memory_group() as group:
        python = venv / "bin" / "python"
        python.write_text(f'#!/bin/bash\n{group.enter}\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        words = ["--max_steps", "5000", "--num_train_epochs", "9999", "--output_dir", str(output)]
        job = cluster.submit("--nodes=1", template("1b"), *inputs, *words, env={"RM_SCALE_VENV": str(venv)})
        cluster.wait_for_step(output, 2)
        Path(f"/proc/{pid_of_rank(0, output)}/oom_score_adj").write_text("1000")
        group.limit(group.usage() + (32 << 20))
        hungry = f"{group.enter}; exec {sys.executable} -c 'import os; os.urandom(96 << 20)'"
        subprocess.run(["bash", "-c", hungry], check=False)
        log = refused(cluster, job, "137:0")
    assert "rank 0 was killed (signal 9) by the kernel's out-of-memory killer (" in log
    assert "compare the plan's host memory (rm-scale plan), ask for more of it (--mem)" in log
