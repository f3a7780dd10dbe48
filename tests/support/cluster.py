"""A Slurm cluster to submit real jobs to, and to break: the one that RM_SCALE_SLURM_CLUSTER names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rm_scale.launch.extensions import prepare_extensions
from tests.support.launching import REPOSITORY, Finished, read_lines

CLI = [sys.executable, "-m", "rm_scale.cli"]
SCRIPT = REPOSITORY / "tests" / "slurm" / "cluster.sh"
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}


@dataclass(frozen=True)
class Job:
    """A submitted job: its number and the folder it was submitted from."""

    number: str
    folder: Path

    @property
    def logs(self) -> Path:
        """Its folder of logs."""
        return self.folder / "logs" / self.number

    def output(self) -> str:
        """What its script and rank 0 printed."""
        found = list(self.folder.glob(f"*-{self.number}.log"))
        return found[0].read_text(errors="replace") if found else ""


def template(tier: str) -> str:
    """The job script of a tier."""
    return str(REPOSITORY / "slurm" / f"rm_{tier}.sh")


class Cluster:
    """Commands on the cluster.

    Args:
        name: folder of a cluster that cluster.sh made, or any other word for that of `sbatch` on PATH.
        work: folder that jobs are submitted from; on the cluster's shared disk.
    """

    def __init__(self, name: str, work: Path) -> None:
        self.work = work
        self.jobs: list[str] = []
        self.own = (Path(name) / "slurm.conf").is_file()
        self.env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        if self.own:
            self.env |= {"SLURM_CLUSTER_DIR": name, "SLURM_CONF": f"{name}/slurm.conf"}
            self.env["PATH"] = f"{name}/bin:{self.env['PATH']}"
        self.env |= {"RM_SCALE_SITE_ENV": str(work / "site.env"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        # Operators that other tests have compiled: a job would compile them on its node's own disk.
        self.env["TORCH_EXTENSIONS_DIR"] = str(prepare_extensions(local_rank=0))
        self.env.pop("CUDA_VISIBLE_DEVICES", None)

    def run(self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Finished:
        """Run a command on the cluster's login node."""
        done = subprocess.run(
            command,
            env={**self.env, **(env or {})},
            cwd=cwd or self.work,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        return Finished(done.returncode, done.stdout)

    def submit(self, *words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Job:
        """`sbatch` these words."""
        answer = self.run("sbatch", "--parsable", *words, env=env, cwd=cwd)
        assert answer.code == 0 and answer.output.strip().isdigit(), answer.output
        self.jobs.append(answer.output.strip())
        return Job(answer.output.strip(), cwd or self.work)

    def show(self, job: Job | str) -> dict[str, str]:
        """`scontrol show job` as a dictionary."""
        number = job.number if isinstance(job, Job) else job
        text = self.run("scontrol", "--oneliner", "show", "job", number).output
        return dict(re.findall(r"(\w[\w:/]*)=(\S*)", text.splitlines()[0]))

    def wait(self, job: Job, seconds: float = 900) -> dict[str, str]:
        """Wait for a job's end."""
        shown: dict[str, str] = {}

        def ended() -> bool:
            shown.update(self.show(job))
            return shown.get("JobState") in FINAL_STATES

        until(ended, seconds, lambda: f"job {job.number}: {shown.get('JobState')}\n{job.output()[-3000:]}", 0.5)
        return shown

    def end_jobs(self) -> None:
        """Cancel what is left of the jobs that were submitted, and wait until it is gone."""
        if self.jobs:
            numbers = ",".join(self.jobs)
            self.run("scancel", "--quiet", *self.jobs)
            left = ["squeue", "--noheader", "--jobs", numbers, "--format", "%i"]
            self.jobs.clear()
            until(
                lambda: not re.search(r"^\d", self.run(*left).output, re.M), 60, lambda: self.run("squeue").output, 0.5
            )

    def wait_for_text(self, job: Job, text: str, seconds: float = 900) -> None:
        """Wait until the job's log holds a text."""
        until(lambda: text in job.output(), seconds, lambda: f"no {text!r} in:\n{job.output()[-3000:]}")

    def wait_for_step(self, output_dir: Path, step: int, seconds: float = 900) -> None:
        """Wait until a run has logged a step."""
        path = output_dir / "run" / "metrics.jsonl"

        def reached() -> bool:
            return path.is_file() and any(line.get("step", 0) >= step for line in read_lines_so_far(path))

        until(reached, seconds, lambda: f"{path} has no step {step}")

    def fault(self, *words: str) -> None:
        """`cluster.sh fault|heal|hide ...`."""
        done = subprocess.run([str(SCRIPT), *words], env=self.env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def inside(self, node: str, code: str) -> str:
        """What shell code prints on a node."""
        done = subprocess.run(
            [str(SCRIPT), "in", node, "bash", "-c", code], env=self.env, capture_output=True, check=False
        )
        return done.stdout.decode(errors="replace")

    def wait_until_idle(self, seconds: float = 900) -> None:
        """Wait until all nodes can take jobs again."""

        def idle() -> bool:
            states = set(self.run("sinfo", "--noheader", "--Node", "--format", "%t").output.split())
            return states == {"idle"}

        until(idle, seconds, lambda: self.run("sinfo", "-N", "-l").output, 0.5)


def until(done: Callable[[], bool], seconds: float, told: Callable[[], str], pause: float = 0.2) -> None:
    """Poll; a failure says what was seen last."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {told()}"
        time.sleep(pause)


def read_lines_so_far(path: Path) -> list[dict[str, object]]:
    """`read_lines` of a file that is being written."""
    try:
        return read_lines(path)
    except ValueError:
        return []


def pid_of_rank(rank: int, output: Path) -> int:
    """The process of a rank; the namespaces of the nodes lie within this machine's."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            environ = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if str(output).encode() in words and b"RANK=%d" % rank in environ and words[2].endswith(b"train.py"):
            return int(folder.name)
    raise AssertionError(f"rank {rank} of {output} does not run")
