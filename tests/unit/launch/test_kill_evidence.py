"""A killed rank is put down to the out-of-memory killer only where the system shows a sign of it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from rm_scale.launch.kill_evidence import KillEvidence, num_oom_kills, was_killed, watched

GB = 1_000_000_000


class Machine:
    """The files in which a system shows its memory and cgroups."""

    def __init__(self, folder: Path, cgroup: str) -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self" / "cgroup").write_text(cgroup)
        self.memory(100, 60)

    def memory(self, total: int, available: int) -> None:
        lines = f"MemTotal:  {total * 976_563} kB\nMemFree:  1 kB\nMemAvailable:  {available * 976_563} kB\n"
        (self.proc / "meminfo").write_text(lines)

    def write(self, name: str, text: str) -> None:
        path = self.cgroups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def watch(self) -> KillEvidence:
        return KillEvidence(self.proc, self.cgroups)


def test_without_a_sign_nobody_is_blamed(tmp_path: Path) -> None:
    evidence = Machine(tmp_path, "0::/job_7\n").watch()
    text = evidence.text([1])
    assert text.startswith("by somebody, or by something that left no sign of itself") and not evidence.is_memory()
    assert "; there is none of the out-of-memory killer; 40.0 of 100.0 GB of this node were in use" in text


V1 = "under_oom 0\noom_kill {}\n"


@pytest.mark.parametrize(
    ("cgroup", "counter", "text"),
    [
        ("0::/job_7/step_0/task_0\n", "job_7/memory.events", "oom 1\noom_kill {}\n"),
        ("4:memory:/slurm/job_7\n", "memory/slurm/job_7/memory.oom_control", V1),
    ],
)
def test_the_counter_of_the_jobs_cgroup(tmp_path: Path, cgroup: str, counter: str, text: str) -> None:
    machine = Machine(tmp_path, cgroup)
    machine.write(counter, text.format(2))
    evidence = machine.watch()
    assert "no sign" in evidence.text([1]), "earlier kills are not this one"
    machine.write(counter, text.format(3))
    assert evidence.text([1]).startswith("by the kernel's out-of-memory killer (its counter for this job rose)")
    assert evidence.is_memory()


@pytest.mark.parametrize(
    ("cgroup", "counter"),
    [
        ("0::/system.slice/job_7/step_0\n", "system.slice/memory.events"),  # above the job: other jobs count there
        ("0::/system.slice/slurmd.service\n", "system.slice/slurmd.service/memory.events"),
        ("0::/\n", "memory.events"),  # a container's own, seen from inside
    ],
)
def test_a_counter_that_others_share_is_no_proof(tmp_path: Path, cgroup: str, counter: str) -> None:
    machine = Machine(tmp_path, cgroup)
    machine.write(counter, "oom_kill 0\n")
    evidence = machine.watch()
    machine.write(counter, "oom_kill 1\n")
    assert evidence.text([1]).startswith("most likely by the kernel's out-of-memory killer (its counter rose, which")


def test_a_kill_of_long_ago_is_not_this_one(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/job_7\n")
    machine.write("job_7/memory.events", "oom_kill 0\n")
    evidence = machine.watch()
    machine.write("job_7/memory.events", "oom_kill 1\n")  # a worker that loads data, say; training went on
    machine.memory(100, 1)
    evidence.look()
    assert evidence.is_memory()
    machine.memory(100, 60)
    for _ in range(10):
        evidence.look()
    assert "no sign" in evidence.text([1])


def test_memory_that_was_nearly_used_up_is_a_sign(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/job\n")
    evidence = machine.watch()
    machine.memory(100, 3)
    (machine.proc / "1").mkdir()
    (machine.proc / "1" / "statm").write_text(f"1 {90 * GB // os.sysconf('SC_PAGE_SIZE')} 1 1 0 1 0")
    evidence.look([1])
    machine.memory(100, 90)  # after the kill
    (machine.proc / "1" / "statm").write_text("0 0 0 0 0 0 0")
    evidence.look([1])
    text = evidence.text([1])
    assert text.startswith("most likely for want of memory; 97.0 of 100.0 GB of this node were in use when last looked")
    assert "of which it held 90.0 GB" in text


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_the_job_counts_as_well(tmp_path: Path, version: int) -> None:
    """Pages of files that were read do not: they fill any limit, and the kernel drops them when it needs room."""
    machine = Machine(tmp_path, "0::/job\n" if version == 2 else "4:memory:/job\n")
    used, limit, folder, prefix = (
        ("memory.current", "memory.max", "job", "")
        if version == 2
        else ("memory.usage_in_bytes", "memory.limit_in_bytes", "memory/job", "total_")
    )
    machine.write(f"{folder}/{limit}", str(10 * GB))
    machine.write(f"{folder}/{used}", str(int(9.9 * GB)))
    stat = f"anon 5\n{prefix}inactive_file {5 * GB}\n{prefix}active_file {GB}\n"
    machine.write(f"{folder}/memory.stat", stat)
    assert not machine.watch().is_memory()
    machine.write(f"{folder}/memory.stat", "anon 5\n")
    evidence = machine.watch()
    assert evidence.is_memory() and "9.9 of 10.0 GB that may be used here" in evidence.text([1])


def test_the_kernel_names_the_process(tmp_path: Path) -> None:
    machine, log = Machine(tmp_path, "0::/job_7\n"), tmp_path / "kmsg"
    record = "3,1,2,-;Memory cgroup out of memory: Killed process {} (python) total-vm:9kB, anon-rss:8kB\n"
    log.write_text(record.format(77))
    evidence = KillEvidence(machine.proc, machine.cgroups, log)
    with log.open("a") as file:
        file.write(record.format(78))
    assert "no sign" in evidence.text([1]) and "no sign" in evidence.text([77]), "another process, and one before"
    text = evidence.text([78], "less")
    assert text.startswith("by the kernel's out-of-memory killer (Killed process 78 (python) total-vm:9kB")
    assert text.endswith(". Fix: less")


def test_no_cgroup_that_can_be_read(tmp_path: Path) -> None:
    assert num_oom_kills(tmp_path / "nowhere") == 0


def test_exit_codes_that_tell_of_signal_9() -> None:
    assert [was_killed(code) for code in (-9, 137, 247, 0, 1, -15, 143, 85)] == [True] * 3 + [False] * 5


def test_watching_what_a_command_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what that starts: ranks lie below their launcher."""
    monkeypatch.setattr("rm_scale.launch.kill_evidence.LOOK_SECONDS", 0.01)
    with subprocess.Popen(["bash", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        rank = int(launcher.stdout.readline())
        with watched() as evidence:
            end = time.monotonic() + 600
            while not {launcher.pid, rank} <= set(evidence._held):
                assert time.monotonic() < end
                time.sleep(0.01)
        os.kill(rank, signal.SIGKILL)
    assert "no sign" in evidence.text()
