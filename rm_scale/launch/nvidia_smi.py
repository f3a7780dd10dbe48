"""Ask `nvidia-smi`, the tool of NVIDIA's driver, about the GPUs of this machine, whatever CUDA_VISIBLE_DEVICES says."""

from __future__ import annotations

import shutil
import subprocess

_TIMEOUT_SECONDS = 60.0
"""The first call after the driver was loaded initialises every GPU."""


def query_gpus(*fields: str) -> list[list[str]]:
    """Return the values of the fields for each GPU, without units; empty where the tool is missing or fails.

    Args:
        fields: as `nvidia-smi --help-query-gpu` names them, such as "name" or "memory.used".

    Raises:
        subprocess.TimeoutExpired: the tool hangs, as it does when a GPU has failed.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    # The index tells a GPU's line from a message: without a GPU some versions say so and still end with code 0.
    command = [tool, f"--query-gpu={','.join(['index', *fields])}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    if done.returncode != 0:
        return []
    rows = [[value.strip() for value in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [row[1:] for row in rows if row[0].isdigit() and len(row) == 1 + len(fields)]
