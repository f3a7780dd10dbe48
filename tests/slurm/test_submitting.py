"""What Slurm itself makes of what we submit: headers of every kind, limits, scripts from anywhere, arrays' status."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.support.cluster import CLI, Cluster, Job, template

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]

# Ends a job right after common.sh has read site.env: it was found, and nothing more is started.
ENDS = {"RM_SCALE_SETUP": "/nowhere/setup.sh"}
ENDED = "RM_SCALE_SETUP=/nowhere/setup.sh: no such file"


def submitted(cluster: Cluster, *words: str, env: dict[str, str] | None = None) -> tuple[Job, str]:
    """A job that `rm-scale slurm submit` sent, and what it said."""
    done = cluster.run(*CLI, "slurm", "submit", *words, env={**ENDS, **(env or {})})
    found = re.search(r"^job (\d+) ", done.output, re.M)
    assert done.code == 0 and found, done.output
    cluster.jobs.append(found[1])
    return Job(found[1], cluster.work), done.output


def test_what_never_starts_is_told_with_the_limit(own_cluster: Cluster) -> None:
    job, told = submitted(own_cluster, "--tier", "1b", "--nodes", "5")
    own_cluster.run("scancel", job.number)
    assert "will not start: the partition main has 4 nodes, and it asks for 5. Fix: --nodes 4" in told


@pytest.mark.parametrize(
    ("tier", "site", "asked"),
    [
        ("1b", {"RM_SCALE_GPU_REQUEST": "gres"}, "gres:gpu:8"),
        ("13b", {"RM_SCALE_GPU_REQUEST": "gres", "RM_SCALE_MEMORY": "60G/gpu", "RM_SCALE_CPUS": "8/gpu"}, "gres:gpu:8"),
        ("1b", {"RM_SCALE_MEMORY": "0", "RM_SCALE_CPUS": "64", "RM_SCALE_EXCLUSIVE": "yes"}, "gres:gpu:8"),
        ("1b", {"RM_SCALE_GPU_REQUEST": "none"}, ""),
        ("7b", {"RM_SCALE_EXCLUSIVE": "no", "RM_SCALE_MEMORY": "4G/core", "RM_SCALE_CPUS": "32"}, "gres:gpu:8"),
        ("1b", {"RM_SCALE_SBATCH_OPTIONS": "--mem=100G --comment=ours --no-requeue"}, "gres:gpu:8"),
        ("1b", {"SBATCH_MEM_PER_NODE": "0"}, "gres:gpu:8"),
    ],
)
def test_slurm_takes_each_way_of_asking(own_cluster: Cluster, tier: str, site: dict[str, str], asked: str) -> None:
    """The shipped headers with these options beside them are refused, or ask for something else."""
    job, _ = submitted(own_cluster, "--tier", tier, "--nodes", "1", env=site)
    shown = own_cluster.wait(job)
    assert shown.get("TresPerNode", "") == asked and shown["Command"] == "(null)"
    assert ENDED in job.output()


def test_a_script_is_found_behind_a_link_and_from_a_copy(cluster: Cluster) -> None:
    """And so is what it needs: by the link, by RM_SCALE_HOME, by the Python of the installed package."""
    folder = cluster.work / "else where"
    folder.mkdir()
    link, copy = folder / "my run.sh", folder / "copy.sh"
    link.symlink_to(template("1b"))
    shutil.copy(template("1b"), copy)
    site = {**ENDS, "RM_SCALE_VENV": str(Path(CLI[0]).parents[1])}
    jobs = [
        cluster.submit("--nodes=1", str(link), "--run_name", "a b", env=ENDS, cwd=folder),
        cluster.submit(
            "--nodes=1", str(copy), env={**ENDS, "RM_SCALE_HOME": str(Path(template("1b")).parents[1])}, cwd=folder
        ),
        cluster.submit("--nodes=1", str(copy), env=site, cwd=folder),
    ]
    for job in jobs:
        cluster.wait(job)
        assert ENDED in job.output(), job.output()


def test_a_bad_line_of_site_env_ends_the_job_with_its_number(cluster: Cluster) -> None:
    bad = cluster.work / "windows.env"
    bad.write_bytes(b"# ours\nRM_SCALE_DEVICE = cpu\n")
    job = cluster.submit("--nodes=1", template("1b"), env={"RM_SCALE_SITE_ENV": str(bad)})
    assert cluster.wait(job)["ExitCode"] == "2:0"
    assert f"{bad}, line 2: RM_SCALE_DEVICE = cpu" in job.output() and "Fix: NAME=value" in job.output()
    done = cluster.run(*CLI, "slurm", "submit", "--tier", "1b", env={"RM_SCALE_SITE_ENV": str(bad)})
    assert done.code == 2 and f"{bad}, line 2: RM_SCALE_DEVICE = cpu" in done.output


def test_the_folder_of_the_log_is_made_and_an_arrays_tasks_are_shown(own_cluster: Cluster) -> None:
    cluster = own_cluster
    job, told = submitted(cluster, "--tier", "1b", "--array", "0-2", "--log", "new_logs/%A_%a.log")
    assert "made the folder of the log: new_logs" in told
    for task in range(3):
        cluster.wait(Job(f"{job.number}_{task}", cluster.work))
        assert ENDED in (cluster.work / "new_logs" / f"{job.number}_{task}.log").read_text()
    shown = cluster.run(*CLI, "slurm", "status", job.number).output
    assert f"job {job.number} rm_1b: array of 3 tasks: 3 FAILED" in shown
    assert [line.split()[0] for line in shown.splitlines()[1:4]] == [f"{job.number}_{task}" for task in range(3)]
    tasks = json.loads(cluster.run(*CLI, "slurm", "status", job.number, "--json").output)["tasks"]
    assert [task["slurm"]["exit_code"] for task in tasks] == ["2:0"] * 3
    done = cluster.run(*CLI, "slurm", "submit", "--tier", "1b", "--log", "logs-%j/a.log")
    assert done.code == 2 and "the folder must have no % pattern" in done.output
