"""Was a process killed by the kernel's out-of-memory killer? What the system shows: counters, its log, memory seen.

Signal 9 comes from that killer, from Slurm, or from anybody. Which it was is said only where there is a sign of it, and
only of the seconds before: hours earlier the killer may have met another process. Standard library only: it runs on
every node of a job.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

KILLED = 137
"""Exit code of a process that got signal 9, as a shell shows it."""

LOOK_SECONDS = 1.0
"""Time between two looks."""

_LOOKS_KEPT = 10
_FULL_SHARE = 0.95
"""From this share of a node's or a job's memory on, its use is taken for a sign."""

_CGROUPS = Path("/sys/fs/cgroup")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def was_killed(code: int) -> bool:
    """Return whether an exit code tells of signal 9: Python's, a shell's, or DeepSpeed's launcher's for a rank."""
    return code in {-9, KILLED, 256 - 9}


@dataclass(frozen=True)
class _Look:
    """What was seen at one time: kills by cgroup, and the fullest memory as a share and in words."""

    kills: dict[Path, int]
    share: float
    memory: str


class KillEvidence:
    """Watch memory and the kernel's counters.

    Args:
        proc: where the kernel shows processes.
        cgroups: where it shows control groups.
        kernel_log: its log, which often only root may read.
    """

    def __init__(
        self, proc: Path = Path("/proc"), cgroups: Path = _CGROUPS, kernel_log: Path = Path("/dev/kmsg")
    ) -> None:
        self._proc = proc
        self._folders = list(_cgroup_folders(proc, cgroups))
        self._kernel_log = _open_at_its_end(kernel_log)
        self._lines: dict[int, str] = {}
        self._held: dict[int, int] = {}
        self._looks: deque[_Look] = deque(maxlen=_LOOKS_KEPT)
        self.look()

    def look(self, pids: Iterable[int] = ()) -> None:
        """Note how much memory is in use, and how much of it each of these processes holds."""
        share, words = 0.0, ""
        for what, used, total in self._memory():
            if total > 0 and used / total >= share:
                share, words = used / total, f"{used / 1e9:.1f} of {total / 1e9:.1f} GB {what}"
        self._looks.append(_Look(self._num_kills(), share, words))
        for pid in pids:
            fields = _text(self._proc / str(pid) / "statm").split()
            held = int(fields[1]) * _PAGE_BYTES if len(fields) > 1 else 0
            self._held[pid] = held or self._held.get(pid, 0)  # one that has just ended holds nothing any more

    def _memory(self) -> Iterator[tuple[str, float, float]]:
        fields = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(self._proc / "meminfo"), re.M))
        if "MemTotal" in fields and "MemAvailable" in fields:
            total = 1024.0 * int(fields["MemTotal"])
            yield "of this node", total - 1024.0 * int(fields["MemAvailable"]), total
        for folder in self._folders:
            for used, limit, prefix in (
                ("memory.current", "memory.max", ""),
                ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_"),
            ):
                numbers = [_text(folder / name).strip() for name in (used, limit)]
                if all(number.isdigit() for number in numbers) and int(numbers[1]) < 1 << 60:
                    # Pages of files are dropped before anything is killed, and reading data fills any limit with them.
                    pattern = rf"^{prefix}(?:in)?active_file (\d+)$"
                    cached = sum(map(int, re.findall(pattern, _text(folder / "memory.stat"), re.M)))
                    yield "that may be used here", max(0.0, float(numbers[0]) - cached), float(numbers[1])

    def _num_kills(self) -> dict[Path, int]:
        return {folder: num_oom_kills(folder) for folder in self._folders}

    def is_memory(self) -> bool:
        """Return whether there is a sign that memory did not suffice."""
        return bool(self._sign(self._held))

    def text(self, pids: Iterable[int] | None = None, fix: str = "") -> str:
        """Say what is known of why a process got signal 9.

        Args:
            pids: of those that were killed; by default all that were looked at.
            fix: what to do where memory did not suffice.
        """
        killed = list(self._held) if pids is None else list(pids)
        held = max((self._held.get(pid, 0) for pid in killed), default=0)
        seen = max(self._looks, key=lambda look: look.share).memory
        seen = f"; {seen} were in use when last looked" if seen else ""
        seen += f", of which it held {held / 1e9:.1f} GB" if seen and held and len(killed) == 1 else ""
        sign = self._sign(killed)
        if sign:
            return f"{sign}{seen}" + (f". Fix: {fix}" if fix else "")
        return (
            "by somebody, or by something that left no sign of itself; there is none of the out-of-memory killer"
            f"{seen}. Look: dmesg, and under Slurm sacct -j JOB -o State,MaxRSS"
        )

    def _sign(self, pids: Iterable[int]) -> str:
        self._read_kernel_log()
        for pid in pids:
            if pid in self._lines:
                return f"by the kernel's out-of-memory killer ({self._lines[pid]})"
        before, now = self._looks[0].kills, self._num_kills()
        for is_own, words in (
            (True, "by the kernel's out-of-memory killer (its counter for this job rose)"),
            (False, "most likely by the kernel's out-of-memory killer (its counter rose, which other jobs may share)"),
        ):
            if any(now[place] > before[place] for place in self._folders if _is_of_a_job(place) == is_own):
                return words
        if max(look.share for look in self._looks) >= _FULL_SHARE:
            return "most likely for want of memory"
        return ""

    def _read_kernel_log(self) -> None:
        """Note what the kernel has said of processes that it killed; each record can be read once."""
        while self._kernel_log is not None:
            try:
                record = os.read(self._kernel_log, 8192).decode(errors="replace")
            except BrokenPipeError:
                continue  # older records were overwritten meanwhile
            except OSError:
                return  # there is no more
            if not record:
                return
            found = re.search(r"(Killed process (\d+) [^\n]{0,120})", record)
            if found:
                self._lines[int(found[2])] = found[1]


@contextlib.contextmanager
def watched() -> Iterator[KillEvidence]:
    """Look every second, in a thread, at this node and at all processes below this one."""
    evidence, ended = KillEvidence(), threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_SECONDS):
            evidence.look(_pids_below(os.getpid()))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield evidence
    finally:
        ended.set()
        thread.join()


def _pids_below(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, _text(task).split()):
            yield child
            yield from _pids_below(child)


def _open_at_its_end(kernel_log: Path) -> int | None:
    """Return the kernel's log, from now on; `None` where it may not be read."""
    try:
        handle = os.open(kernel_log, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        os.lseek(handle, 0, os.SEEK_END)
        return handle
    os.close(handle)
    return None


def _cgroup_folders(proc: Path, cgroups: Path) -> Iterator[Path]:
    """Yield this process's memory cgroup and those above it, in either version of cgroups.

    The topmost is looked at as well: in a container it is the container's own, and elsewhere it counts nothing.
    """
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
        yield root


def _is_of_a_job(folder: Path) -> bool:
    """Return whether a cgroup is one that Slurm has made for a job, or lies in it."""
    return any(re.fullmatch(r"job_\d+", part) for part in folder.parts)


def num_oom_kills(folder: Path) -> int:
    """Return how many processes the out-of-memory killer has ended in a cgroup and those below it."""
    texts = [_text(folder / name) for name in ("memory.events", "memory.oom_control")]
    return max(int(count) for text in texts for count in ["0", *re.findall(r"^oom_kill (\d+)$", text, re.M)])


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
