"""Hand a job to Slurm, and check what it answered."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rm_scale.config_parsing import parse_config
from rm_scale.errors import ConfigError, UserError
from rm_scale.slurm.job_options import sbatch_options
from rm_scale.slurm.site import name_of_tier, script_of_tier, site_variables, variables_of_tier

_HOPELESS = {
    "PartitionTimeLimit": "--time is longer than the partition allows",
    "PartitionNodeLimit": "the partition does not give so many nodes to one job",
    "BadConstraints": "no node has these features",
    "AssocGrpBillingMinutes": "the account has no time left",
    "InvalidAccount": "there is no such account",
    "InvalidQOS": "there is no such quality of service",
    "DependencyNeverSatisfied": "a job it waits for has ended otherwise",
    "ReqNodeNotAvail": "a node it names is down or reserved",
    "JobHeldUser": "it is held; scontrol release",
}


@dataclass(frozen=True)
class Submission:
    """An sbatch command.

    Attributes:
        options: by sbatch's names.
        variables: for the job, besides the environment.
        script: the job script.
        settings: for `rm_scale/train.py`.
    """

    options: dict[str, str]
    variables: dict[str, str]
    script: Path
    settings: tuple[str, ...]

    def command(self, *extra: str) -> list[str]:
        """Return the command as a list of arguments, which no shell reads.

        Raises:
            UserError: a variable's value has a comma, which sbatch would cut it at.
        """
        command = ["sbatch", "--parsable", *extra, *(f"--{name}={value}" for name, value in self.options.items())]
        if self.variables:
            bad = [name for name, value in self.variables.items() if re.search(r"[,\s=]", value)]
            if bad:
                raise UserError(
                    f"{bad[0]}={self.variables[bad[0]]!r}: sbatch cuts it at commas. Fix: set it in site.env."
                )
            command.append("--export=ALL," + ",".join(f"{name}={value}" for name, value in self.variables.items()))
        return [*command, str(self.script), *self.settings]


def run(options: argparse.Namespace, settings: Sequence[str]) -> int:
    """Run `rm-scale slurm submit`; return 0 when Slurm took the job."""
    submission = from_options(options, settings)
    return send(submission, test_only=options.test_only, dry_run=options.dry_run)


def from_options(options: argparse.Namespace, settings: Sequence[str]) -> Submission:
    """Return the submission that the options ask for.

    Raises:
        ConfigError: options or settings are wrong.
    """
    if (options.tier is None) == (options.script is None):
        raise ConfigError(["tier and script: give one of them. Fix: --tier 13b, or --script FILE from slurm render."])
    job = sbatch_options(options)
    check_names(settings)
    if options.script is not None:
        if not Path(options.script).is_file():
            raise ConfigError(
                [f"script={options.script}: no such file. Fix: rm-scale slurm render --tier 13b writes one."]
            )
        return Submission(job, {}, Path(options.script), tuple(settings))
    job = {**name_of_tier(options.tier), **job}
    return Submission(job, variables_of_tier(options.tier), script_of_tier(options.tier), tuple(settings))


def check_names(settings: Sequence[str]) -> None:
    """Refuse misspelt settings and impossible values now rather than hours later.

    Raises:
        ConfigError: all of them. What is only missing may come from the script's configuration.
    """
    parsed = parse_config(settings)
    unreadable = ("no such setting", "expected a --flag", "can't be read", "not valid YAML")
    bad = [
        problem
        for problem in parsed.problems
        if any(text in problem for text in unreadable)
        or any(problem.startswith(f"{name}=") for name in parsed.broken)
        or problem.startswith("force")
    ]
    if bad:
        raise ConfigError(bad)


def send(submission: Submission, test_only: bool = False, dry_run: bool = False) -> int:
    """Print the command and run it.

    Raises:
        UserError: there is no Slurm here, or it refused.
    """
    command = submission.command(*(["--test-only"] if test_only else []))
    print(shlex.join(command), flush=True)
    if dry_run:
        return 0
    answer = call_slurm(command, site_variables())
    told = answer.stderr.strip()
    if answer.returncode != 0:
        raise UserError(
            f"sbatch refused the job: {told or answer.stdout.strip()}. Fix: change what it names, and try again."
        )
    if test_only:
        print(told or "sbatch would take it")
        return 0
    job = answer.stdout.strip().split(";")[0]
    if not job.isdigit():
        raise UserError(f"sbatch answered {answer.stdout.strip()!r}, not a job's number. Fix: look at squeue --me.")
    if told:
        print(told)
    print(f"job {job} {_state(job)}\nwatch it: rm-scale slurm status {job}")
    return 0


def call_slurm(command: Sequence[str], environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Raises:
        UserError: it is not there, or does not answer.
    """
    try:
        return subprocess.run(
            command, env=environ or os.environ, capture_output=True, text=True, check=False, timeout=120
        )
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} was not found: there is no Slurm here. Fix: log in to the cluster; without Slurm, "
            "rm-scale launch starts runs here or over a hostfile."
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer in 120 s. Fix: scontrol ping says whether Slurm is up.") from None


def _state(job: str) -> str:
    """Say in which state a job is, and whether it can ever start."""
    answer = call_slurm(["squeue", "--noheader", "--jobs", job, "--format", "%T|%r"])
    state, _, reason = (answer.stdout.split("\n")[0].strip() or "was submitted|None").partition("|")
    why = next((text for name, text in _HOPELESS.items() if reason.strip("()").startswith(name)), None)
    if why is not None:
        return f"is {state.lower()}, and will not start: {reason} ({why})"
    return f"is {state.lower()}" + (f" ({reason})" if reason not in {"None", ""} else "")
