"""A control group with a limit of memory, as Slurm makes for a job: only what is in it meets the kernel's killer."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class MemoryGroup:
    """A control group; `enter` is shell code that puts a shell, and what it starts, into it."""

    def __init__(self, folder: Path, limit: str, usage: str) -> None:
        self.folder = folder
        self.enter = f'echo $$ >"{folder}/cgroup.procs"'
        self._limit, self._usage = folder / limit, folder / usage

    def usage(self) -> int:
        """Bytes in use."""
        return int(self._usage.read_text())

    def limit(self, num_bytes: int) -> None:
        """Set how many bytes may be in use, of which the kernel can give back what it only keeps of files."""
        self._limit.write_text(str(num_bytes))


@contextmanager
def memory_group() -> Iterator[MemoryGroup]:
    """Make one without a limit; the test is skipped where none can be made."""
    root, limit, usage = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
    if not root.exists():
        root, limit, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
    folder = root / f"job_{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if not (folder / limit).exists():
            pytest.skip("control groups have no limit of memory here")
        yield MemoryGroup(folder, limit, usage)
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a group once what was in it has ended."""
    for _ in range(600):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)
    folder.rmdir()
