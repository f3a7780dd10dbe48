"""Run a module of this package on several ranks through DeepSpeed's launcher, and end them all after a time limit."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from rm_scale.distributed import has_gpu
from rm_scale.errors import UserError
from rm_scale.files import free_port

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ended:
    """How the ranks ended.

    Attributes:
        code: exit code of the launcher, `None` when it ran out of time and was ended.
        output: standard output and standard error of all ranks and of the launcher.
    """

    code: int | None
    output: str

    def tail(self, num_lines: int = 6) -> str:
        """Return the last lines, joined to one."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        return " | ".join(lines[-num_lines:])


def start_ranks(
    module: str, arguments: Sequence[str], num_ranks: int, timeout_seconds: float, hostfile: str | None = None
) -> Ended:
    """Run `python -m module arguments` on every rank and wait for all of them.

    A single rank on this machine needs no launcher and is started without one.

    Args:
        module: dotted name; its ranks find their place by `rm_scale.distributed.detect_world`.
        arguments: for the module.
        num_ranks: ranks on this machine; not looked at with a hostfile.
        timeout_seconds: after this everything that was started is ended.
        hostfile: DeepSpeed's list of machines, `NAME slots=N` a line.
    """
    command = [sys.executable, "-m", module, *arguments]
    if hostfile is not None or num_ranks > 1:
        where = ["--hostfile", hostfile] if hostfile is not None else device_flags(num_ranks, has_gpu())
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *where, "--master_port", str(free_port())]
        command = [*launcher, "--no_local_rank", "--module", module, *arguments]
    process = subprocess.Popen(
        command,
        env=launcher_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
        return Ended(process.returncode, output)
    except subprocess.TimeoutExpired:
        _end_tree(process.pid)
        output, _ = process.communicate()
        return Ended(None, output)
    except BaseException:  # Ctrl-C must not leave ranks behind
        _end_tree(process.pid)
        raise


def device_flags(num_ranks: int, on_gpus: bool) -> list[str]:
    """Return the launcher's options for the ranks of this machine: which devices, or how many.

    Told only how many, DeepSpeed's launcher ignores CUDA_VISIBLE_DEVICES and takes the machine's first.

    Args:
        num_ranks: how many.
        on_gpus: each takes a GPU.
    """
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if on_gpus and len(names) >= num_ranks and all(name.isdigit() for name in names):
        return ["--include", f"localhost:{','.join(names[:num_ranks])}"]
    return ["--num_accelerators", str(num_ranks)]


def num_local_ranks(asked: int | None, default_on_cpu: int) -> int:
    """Return how many ranks this machine is to run: as asked, else one per GPU, else `default_on_cpu`.

    Raises:
        UserError: fewer than one, or more than there are GPUs.
    """
    import torch

    gpus = torch.cuda.device_count() if has_gpu() else 0
    if asked is None:
        return gpus or default_on_cpu
    if asked < 1:
        raise UserError(f"nproc={asked}: must be at least 1. Fix: give the number of ranks on this machine.")
    if gpus and asked > gpus:
        raise UserError(f"nproc={asked}: this machine shows {gpus} GPUs. Fix: --nproc {gpus} or less.")
    return asked


def launcher_environment() -> dict[str, str]:
    """Return this process's environment without the variables of an earlier launcher."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    # DeepSpeed's launcher looks for accelerators itself, so it must be told when there are none.
    return kept if has_gpu() else {**kept, "DS_ACCELERATOR": "cpu"}


def _end_tree(pid: int) -> None:
    """Kill a process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
