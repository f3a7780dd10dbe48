"""What Slurm gave a job, read inside it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from rm_scale.errors import UserError


@dataclass(frozen=True)
class Allocation:
    """A job's nodes and what each has.

    Attributes:
        job_id: Slurm's number of the job, or of this task of an array.
        life: how often the job was restarted before.
        nodes: names, in Slurm's order; the job's script runs on the first.
        gpus_per_node: GPUs on the first node; 0 when none were asked for.
        array_task: this task of an array, `None` outside one.
    """

    job_id: int
    life: int
    nodes: tuple[str, ...]
    gpus_per_node: int
    array_task: int | None


def read_allocation(environ: Mapping[str, str]) -> Allocation:
    """The allocation that this script runs in.

    Raises:
        UserError: this is no Slurm job.
    """
    job = environ.get("SLURM_JOB_ID", "")
    names = environ.get("SLURM_JOB_NODELIST", "")
    if not job.isdigit() or not names:
        raise UserError(
            "SLURM_JOB_ID and SLURM_JOB_NODELIST are not set: this is no Slurm job. Fix: submit the script with sbatch."
        )
    task = environ.get("SLURM_ARRAY_TASK_ID", "")
    return Allocation(
        job_id=int(job),
        life=int(environ.get("SLURM_RESTART_COUNT") or 0),
        nodes=tuple(host_names(names)),
        gpus_per_node=int(environ.get("SLURM_GPUS_ON_NODE") or 0),
        array_task=int(task) if task.isdigit() else None,
    )


def host_names(node_list: str) -> list[str]:
    """Slurm's short form `node[1-4]`, written out.

    Raises:
        UserError: Slurm can't read it, or is not here.
    """
    if "[" not in node_list and "," not in node_list:
        return [node_list]
    try:
        answer = subprocess.run(
            ["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"SLURM_JOB_NODELIST={node_list!r}: scontrol can't write it out ({error}). Fix: check that "
            "Slurm's commands work on the job's first node."
        ) from error
    return answer.stdout.split()
