"""What one life of a job was started with: written by `prepare`, read by every node, kept as a record."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

START_FILE = "start.json"
FENCE_FILE = "current_life"
FENCE_SECONDS = 2.0
"""How often a node looks whether its life is still the present one."""


@dataclass(frozen=True)
class Start:
    """One life of a job: the time from one start of its script to the next.

    Attributes:
        job_id: Slurm's.
        life: how often the job was restarted before; 0 for the first.
        nodes: names, in Slurm's order; the first is where the job's script runs.
        ranks_per_node: processes on each.
        gpus_per_node: GPUs that the allocation has on the first node.
        master_addr, master_port: where rank 0 waits for the others.
        train: the file that every rank runs.
        settings: words for it.
        asked: words that the user gave, before the plan filled in others.
        output_dir: where the run writes.
        folder: of this life: logs of ranks, and how each node ended.
    """

    job_id: int
    life: int
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
        """Ranks in all."""
        return len(self.nodes) * self.ranks_per_node

    def write(self) -> Path:
        """Put it into its folder, whole or not at all."""
        path = Path(self.folder) / START_FILE
        write_whole(path, json.dumps(asdict(self), indent=2))
        return path


def read_start(path: Path) -> Start:
    """The inverse of `Start.write`."""
    values = json.loads(path.read_text(encoding="utf-8"))
    lists = {name: tuple(values[name]) for name in ("nodes", "settings", "asked")}
    return Start(**{**values, **lists})


def write_whole(path: Path, text: str) -> None:
    """Write a file that others read at any moment: they see the old content or the new, never a part."""
    aside = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def end_path(folder: Path, node: str) -> Path:
    """Where a node of a life writes how it ended."""
    return folder / f"{node}.end.json"


def fence_path(job_folder: Path) -> Path:
    """The file that holds the number of the job's present life.

    A node that lost its network goes on while Slurm starts the job elsewhere. Where it still reaches the disk it finds
    here that it has been replaced, and ends its ranks before they write over the new life's files.
    """
    return job_folder / FENCE_FILE


def read_fence(job_folder: Path) -> int | None:
    """The job's present life; `None` when it can't be read."""
    try:
        return int(fence_path(job_folder).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
