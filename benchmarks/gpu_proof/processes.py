"""Processes with an end that is sure to come: everything that a step has started bears its mark, and goes with it.

A step starts launchers, they start ranks, and some of these open sessions of their own; a process group or a tree of
parents would lose them. The mark is a variable of their environment, which is handed down.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

MARK = "RM_SCALE_GPU_PROOF_STEP"
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_DEEPSPEED")


def start(
    command: Sequence[str], log: Path, mark: str, environment: Mapping[str, str], folder: Path
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**environment, MARK: mark},
            cwd=folder,
            start_new_session=True,
        )


def plain_environment() -> dict[str, str]:
    """Return this process's environment without the traces of a launcher."""
    return {name: value for name, value in os.environ.items() if name not in _LAUNCHER}


def marked(mark: str) -> Iterator[psutil.Process]:
    """Find the living processes of a step, this one left out; a mark stands for "mark/..." too."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            found = process.environ().get(MARK, "")
            is_of_it = found == mark or found.startswith(f"{mark}/")
            if is_of_it and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def end_all(mark: str, seconds: float = 10.0) -> int:
    """Kill everything that bears the mark, stopped processes too; return how many there were.

    Args:
        mark: of the step.
        seconds: a process that is being started while others are killed is found on a next look, so long.
    """
    count, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = list(marked(mark))
        if not found:
            break
        for process in found:
            with contextlib.suppress(psutil.Error, OSError):
                process.send_signal(signal.SIGKILL)
                count += 1
        time.sleep(0.05)
    return count


def tail(log: Path, num_characters: int = 600) -> str:
    """Return the end of a log in one line, lines that name an error first."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "Fix:" in line or "rror:" in line]
    return " | ".join([*telling[-2:], *lines[-2:]])[-num_characters:]
