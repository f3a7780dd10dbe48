"""How long the first save of a run will take: its bytes, and how fast the disk takes them, measured.

Only for a run whose job ends at a known time and which has no save on record: from the first save on, what that took
counts. A save also gathers weights, reads files back and loads the model again; this is left to the margin, which has
twice the expected time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from rm_scale.distributed import detect_world

MOST_SECONDS, MOST_BYTES = 2.0, 256 * 2**20
"""The measurement ends with whichever comes first."""

MOST_OF_FREE = 0.05
"""Share of the free space that it takes for a moment."""

_FIRST_BLOCK, _LARGEST_BLOCK = 2**18, 2**25

WEIGHT_BYTES, STATE_BYTES = 4, 12
"""Of a checkpoint for each trained parameter: the weight, and its fp32 master and two moments."""


@dataclass(frozen=True)
class ExpectedSave:
    """How long a save is expected to take.

    Attributes:
        seconds: see there.
        reason: why, for the log.
    """

    seconds: float
    reason: str


def expected_save(model: torch.nn.Module, output_dir: Path) -> ExpectedSave | None:
    """Return how long the checkpoint of a stop will take; `None` where the disk refuses the measurement.

    The rate of one process stands for all those of its node. That is careful: several at once are no slower together
    than one, and on disks of a network, where each stream has a limit of its own, much faster.

    Args:
        model: with the weights that are trained.
        output_dir: where checkpoints go.
    """
    num_bytes = bytes_on_first_node(model)
    rate = write_rate(output_dir, num_bytes)
    if rate is None:
        return None
    return ExpectedSave(num_bytes / rate, f"{num_bytes / 1e9:.3g} GB at {rate / 1e6:,.0f} MB/s")


def bytes_on_first_node(model: torch.nn.Module) -> int:
    """Return what the first node writes at a stop: all weights, which rank 0 gathers, and its share of the state."""
    world = detect_world()
    num_nodes = max(1, world.size // world.ranks_on_node)
    trained: int = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    return trained * WEIGHT_BYTES + trained * STATE_BYTES // num_nodes


def write_rate(folder: Path, most_bytes: int) -> float | None:
    """Return how many bytes a second a disk takes from this process, flushed; `None` where it refuses them.

    The file loses its name before anything is written to it, so that nothing of it stays, however the process ends.

    Args:
        folder: on that disk.
        most_bytes: no more are written; nor more than `MOST_BYTES`, nor for longer than about `MOST_SECONDS`.
    """
    path = folder / f".write-rate-{os.getpid()}-{os.urandom(4).hex()}"
    with contextlib.suppress(OSError):
        limit = min(most_bytes, MOST_BYTES, int(shutil.disk_usage(folder).free * MOST_OF_FREE))
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            path.unlink()
            return _rate(handle, limit)
        finally:
            os.close(handle)
            path.unlink(missing_ok=True)
    return None


def _rate(handle: int, most_bytes: int) -> float | None:
    """Write growing blocks, each flushed, until the next would take too long; return bytes a second.

    Raises:
        OSError: the disk refuses them.
    """
    block = os.urandom(min(_LARGEST_BLOCK, max(1, most_bytes)))  # nothing that a file system could compress
    size, written, began, seconds = _FIRST_BLOCK, 0, time.monotonic(), 0.0
    while written < most_bytes:
        size = min(size, most_bytes - written, len(block))
        if written and seconds * (written + size) / written > MOST_SECONDS:
            break
        written += os.write(handle, block[:size])
        os.fsync(handle)
        seconds = time.monotonic() - began
        size *= 2
    return written / max(seconds, 1e-6) if written else None
