"""Was a rank killed by the kernel's out-of-memory killer? What the system shows of it: counters, its log, memory seen.

Signal 9 comes from that killer, from Slurm, or from anybody. Which it was is said only where there is a sign of it.
Standard library only: it runs on every node of a job.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_FULL_SHARE = 0.95
"""From this share of a node's or a job's memory on, its use is taken for a sign."""


class KillEvidence:
    """Watch memory and the kernel's counters from the start of a node's ranks on."""

    def __init__(self, proc: Path = Path("/proc"), cgroups: Path = _CGROUPS) -> None:
        self._proc = proc
        self._folders = list(_cgroup_folders(proc, cgroups))
        self._kills = num_oom_kills(self._folders)
        self._kernel_log = _open_kernel_log()
        self._most_used = 0.0
        self._seen = ""

    def look(self) -> None:
        """Note how much memory is in use on this node, and in this job where it has a limit."""
        for what, used, total in self._memory():
            if total > 0 and used / total >= self._most_used:
                self._most_used = used / total
                self._seen = f"{used / 1e9:.1f} of {total / 1e9:.1f} GB {what}"

    def _memory(self) -> Iterable[tuple[str, float, float]]:
        fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(self._proc / "meminfo"), re.M))
        if "MemTotal" in fields and "MemAvailable" in fields:
            total = 1024.0 * int(fields["MemTotal"])
            yield "of this node were in use", total - 1024.0 * int(fields["MemAvailable"]), total
        for folder in self._folders:
            for used, limit in (
                ("memory.current", "memory.max"),
                ("memory.usage_in_bytes", "memory.limit_in_bytes"),
            ):
                numbers = [_text(folder / name).strip() for name in (used, limit)]
                if all(number.isdigit() for number in numbers) and int(numbers[1]) < 1 << 60:
                    yield "that the job may have were in use", float(numbers[0]), float(numbers[1])

    def text(self, pids: Iterable[int]) -> str:
        """Say what is known of why processes got signal 9.

        Args:
            pids: of the ranks that were killed.
        """
        kills = num_oom_kills(self._folders) - self._kills
        if kills > 0:
            return (
                f"by the kernel's out-of-memory killer (its counter for this job rose by {kills}); compare the plan's "
                "host memory, ask for more --mem"
            )
        line = self._line_of(set(pids))
        if line:
            return f"by the kernel's out-of-memory killer ({line}); compare the plan's host memory, ask for more --mem"
        if self._most_used >= _FULL_SHARE:
            return f"most likely for want of memory: at most {self._seen}; compare the plan's host memory"
        seen = f"; at most {self._seen}" if self._seen else ""
        return (
            f"by somebody, or by something that left no sign of itself{seen}. Look: dmesg, sacct -j JOB -o State,MaxRSS"
        )

    def _line_of(self, pids: set[int]) -> str:
        """Return the kernel's line about the end of one of these processes; empty where there is none to be read."""
        if self._kernel_log is None:
            return ""
        while True:
            try:
                record = os.read(self._kernel_log, 8192).decode(errors="replace")
            except BrokenPipeError:
                continue  # older records were overwritten meanwhile
            except OSError:
                return ""
            found = re.search(r"(Killed process (\d+) [^\n]{0,120})", record)
            if found and int(found[2]) in pids:
                return found[1]


def _open_kernel_log() -> int | None:
    """Return the kernel's log, from now on; `None` where it may not be read."""
    try:
        handle = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        os.lseek(handle, 0, os.SEEK_END)
        return handle
    os.close(handle)
    return None


def _cgroup_folders(proc: Path, cgroups: Path) -> Iterable[Path]:
    """Yield this process's memory cgroup and those above it, in either version of cgroups."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root = cgroups if controllers == "" else cgroups / "memory"
        folder = root / name.lstrip("/")
        while folder != root and root in folder.parents:
            yield folder
            folder = folder.parent


def num_oom_kills(folders: Iterable[Path]) -> int:
    """Return how many processes the out-of-memory killer has ended in cgroups; the largest, since they are nested."""
    counts = [0]
    for folder in folders:
        for name in ("memory.events", "memory.oom_control"):
            counts += [int(count) for count in re.findall(r"^oom_kill (\d+)$", _text(folder / name), re.M)]
    return max(counts)


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
