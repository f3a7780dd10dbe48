"""The nodes and GPUs that Slurm gave a job, read inside the job."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from rm_scale.errors import UserError

_NUMBER = re.compile("[0-9]{1,12}")


@dataclass(frozen=True)
class Allocation:
    """A job's nodes and what each has.

    Attributes:
        job_id: Slurm's number of the job, or of this task of an array.
        attempt: how often the job was restarted before.
        nodes: names, in Slurm's order; the job's script runs on the first.
        gpus_per_node: GPUs on the first node; 0 when none were asked for.
        array_task: this task of an array, `None` outside one.
    """

    job_id: int
    attempt: int
    nodes: tuple[str, ...]
    gpus_per_node: int
    array_task: int | None


def read_allocation(environ: Mapping[str, str]) -> Allocation:
    """Return the allocation that this script runs in.

    Raises:
        UserError: this is no Slurm job, it is one of several parts, or a variable of Slurm's does not hold what it
            should.
    """
    job = environ.get("SLURM_JOB_ID", "")
    names = environ.get("SLURM_JOB_NODELIST", "")
    if not _NUMBER.fullmatch(job) or not names:
        raise UserError(
            "SLURM_JOB_ID and SLURM_JOB_NODELIST are not set: this is no Slurm job. Fix: submit the script with sbatch."
        )
    if environ.get("SLURM_HET_SIZE"):
        raise UserError(
            f"SLURM_HET_SIZE={environ['SLURM_HET_SIZE']}: a heterogeneous job, and all nodes of a run are asked for in "
            "one request. Fix: submit it without ':' between options of sbatch, and without #SBATCH hetjob lines."
        )
    # Inside a container there is no scontrol: the job's script has asked outside.
    written_out = environ.get("RM_SCALE_NODES", "").split()
    return Allocation(
        job_id=int(job),
        attempt=slurm_number(environ, "SLURM_RESTART_COUNT"),
        nodes=tuple(written_out or host_names(names)),
        gpus_per_node=slurm_number(environ, "SLURM_GPUS_ON_NODE"),
        array_task=slurm_number(environ, "SLURM_ARRAY_TASK_ID") if environ.get("SLURM_ARRAY_TASK_ID") else None,
    )


def slurm_number(environ: Mapping[str, str], name: str) -> int:
    """Return the whole number in one of Slurm's variables; 0 where it is not set.

    Raises:
        UserError: it holds something else.
    """
    text = environ.get(name, "").strip() or "0"
    if not _NUMBER.fullmatch(text):
        raise UserError(
            f"{name}={text[:80]!r}: must be a whole number, as Slurm sets it. Fix: unset it in the script or in "
            "site.env; only Slurm may set it."
        )
    return int(text)


def host_names(node_list: str) -> list[str]:
    """Return the names that Slurm's short form, such as `node[1-4]`, stands for.

    Raises:
        UserError: Slurm can't read it, or is not here.
    """
    if re.fullmatch(r"[A-Za-z0-9._-]+", node_list):
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
    names = answer.stdout.split()
    if not names:
        raise UserError(
            f"SLURM_JOB_NODELIST={node_list!r}: scontrol names no node for it. Fix: unset it in the script or in "
            "site.env; only Slurm may set it."
        )
    return names
