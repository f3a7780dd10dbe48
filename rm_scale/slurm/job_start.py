"""What one attempt of a job was started with: written by `prepare`, read by every node, kept as a record."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rm_scale.files import write_whole

START_FILE = "start.json"
FENCE_FILE = "current_attempt"
FENCE_SECONDS = 2.0
"""Time between two looks of a node whether its attempt is still the present one."""


@dataclass(frozen=True)
class Start:
    """One attempt of a job: the time from one start of its script to the next.

    Attributes:
        job_id: Slurm's.
        attempt: how often the job was restarted before; 0 for the first.
        nodes: names, in Slurm's order; the first is where the job's script runs.
        ranks_per_node: processes on each.
        gpus_per_node: GPUs that the allocation has on the first node.
        master_addr, master_port: where rank 0 waits for the others.
        train: the file that every rank runs.
        settings: its command line.
        asked: the settings that the user gave, before the plan filled in others.
        output_dir: where the run writes.
        folder: of this attempt: logs of ranks, and how each node ended.
    """

    job_id: int
    attempt: int
    nodes: tuple[str, ...]
    ranks_per_node: int
    gpus_per_node: int
    master_addr: str
    master_port: int
    train: str
    settings: tuple[str, ...]
    asked: tuple[str, ...]
    output_dir: str
    folder: str

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.nodes) * self.ranks_per_node

    def write(self) -> Path:
        """Write it into its folder, whole or not at all; return the path."""
        path = Path(self.folder) / START_FILE
        write_whole(path, json.dumps(asdict(self), indent=2))
        return path


def read_start(path: Path) -> Start:
    """Read back what `Start.write` wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    lists = {name: tuple(values[name]) for name in ("nodes", "settings", "asked")}
    return Start(**{**values, **lists})


def end_path(folder: Path, node: str) -> Path:
    """Return the file in which a node of an attempt writes how it ended."""
    return folder / f"{node}.end.json"


def fence_path(job_folder: Path) -> Path:
    """Return the file that holds the number of the job's present attempt.

    A node that lost its network goes on while Slurm starts the job elsewhere. Where it still reaches the disk it finds
    here that it has been replaced, and ends its ranks before they write over the new attempt's files.
    """
    return job_folder / FENCE_FILE


def read_fence(job_folder: Path) -> int | None:
    """Return the number of the job's present attempt; `None` when it can't be read."""
    try:
        return int(fence_path(job_folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
