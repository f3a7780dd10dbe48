"""A killed rank is put down to the out-of-memory killer only where the system shows a sign of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rm_scale.slurm.kill_evidence import KillEvidence, num_oom_kills

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
    evidence = Machine(tmp_path, "0::/job\n").watch()
    evidence.look()
    text = evidence.text([1])
    assert text.startswith("by somebody, or by something that left no sign of itself; at most 40.0 of 100.0 GB")


@pytest.mark.parametrize(
    ("cgroup", "counter", "before", "after"),
    [
        ("0::/job_7/step_0/task_0\n", "job_7/memory.events", "oom 0\noom_kill 2\n", "oom 1\noom_kill 3\n"),
        (
            "4:memory:/slurm/job_7\n",
            "memory/slurm/job_7/memory.oom_control",
            "oom_kill 0\n",
            "under_oom 0\noom_kill 1\n",
        ),
    ],
)
def test_the_counter_of_a_cgroup_or_one_above_it(
    tmp_path: Path, cgroup: str, counter: str, before: str, after: str
) -> None:
    machine = Machine(tmp_path, cgroup)
    machine.write(counter, before)
    evidence = machine.watch()
    assert "no sign" in evidence.text([1])
    machine.write(counter, after)
    assert evidence.text([1]).startswith("by the kernel's out-of-memory killer (its counter for this job rose by 1)")


def test_memory_that_was_nearly_used_up_is_a_sign(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/job\n")
    evidence = machine.watch()
    machine.memory(100, 3)
    evidence.look()
    machine.memory(100, 90)  # after the kill
    evidence.look()
    assert evidence.text([1]).startswith("most likely for want of memory: at most 97.0 of 100.0 GB of this node")


def test_the_limit_of_the_job_counts_as_well(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/job\n")
    machine.write("job/memory.max", str(10 * GB))
    machine.write("job/memory.current", str(int(9.9 * GB)))
    evidence = machine.watch()
    evidence.look()
    assert "9.9 of 10.0 GB that the job may have" in evidence.text([1])


def test_no_cgroup_that_can_be_read(tmp_path: Path) -> None:
    assert num_oom_kills([tmp_path / "nowhere"]) == 0
