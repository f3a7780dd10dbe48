"""Small disks of their own for tests, which can be filled, emptied, made read-only and taken away. They need root."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class SmallDisk:
    """A mounted tmpfs; `path` is its folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self, log: Path | None = None) -> None:
        """Take all room that is left; a log, which may hold anything, is filled to the end of its last page as well."""
        for path, content in ((self.path / "filling", bytes(4096)), (log, b".")):
            if path is not None:
                with path.open("ab", buffering=0) as file:
                    try:
                        while True:
                            file.write(content)
                    except OSError as error:
                        assert error.errno == errno.ENOSPC, error

    def empty(self) -> None:
        """Give that room back."""
        (self.path / "filling").unlink()

    def remount(self, *options: str) -> None:
        """Change how it is mounted, such as `ro` or `size=64k`."""
        # A file that is open to write keeps it busy for a moment.
        subprocess.run(["mount", "-o", f"remount,{','.join(options)}", str(self.path)], check=True)


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[SmallDisk]:
    """Mount a tmpfs of this size at `path`; skip the test where that is not allowed."""
    path.mkdir(parents=True)
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)
