"""Hand a job to Slurm, and check what it answered."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rm_scale.errors import ConfigError, UserError
from rm_scale.launch.planned_run import refuse_named_model_of_another_size
from rm_scale.slurm import waiting
from rm_scale.slurm.header import (
    environment_options,
    gpu_options,
    header_changes,
    named_by_environment,
    options_before_script,
    read_header,
)
from rm_scale.slurm.job_options import sbatch_options
from rm_scale.slurm.render import render
from rm_scale.slurm.settings_check import check_names
from rm_scale.slurm.site import name_of_tier, script_of_tier, site_variables, unknown_variables, variables_of_tier
from rm_scale.slurm.time_limits import fitting_grace


@dataclass(frozen=True)
class Submission:
    """An sbatch command.

    Attributes:
        options: by sbatch's names.
        variables: for the job, besides the environment.
        script: the job script.
        settings: for `rm_scale/train.py`.
        text: of a script written for this job, with options and settings in it, which sbatch reads on its standard
            input in the place of `script`; none where the script can be sent as it is.
        over_environment: names of options that must be on the command although they are in `text`: `SBATCH_` variables
            count before a script's lines.
    """

    options: dict[str, str]
    variables: dict[str, str]
    script: Path
    settings: tuple[str, ...]
    text: str | None = None
    over_environment: frozenset[str] = frozenset()

    def command(self, *extra: str) -> list[str]:
        """Return the command as a list of arguments, which no shell reads.

        Raises:
            UserError: a variable's value has a comma, which sbatch would cut it at.
        """
        written = self.header() if self.over_environment else {}
        options = self.options if self.text is None else {name: written[name] for name in sorted(self.over_environment)}
        command = ["sbatch", "--parsable", *extra, *(f"--{name}={value}" for name, value in options.items())]
        if self.variables:
            bad = [name for name, value in self.variables.items() if re.search(r"[,\s=]", value)]
            if bad:
                raise UserError(
                    f"{bad[0]}={self.variables[bad[0]]!r}: sbatch cuts it at commas. Fix: set it in site.env."
                )
            command.append("--export=ALL," + ",".join(f"{name}={value}" for name, value in self.variables.items()))
        return command if self.text is not None else [*command, str(self.script), *self.settings]

    def header(self) -> dict[str, str]:
        """Return the options that the script's lines give."""
        return read_header(self.text or self.script.read_text(encoding="utf-8", errors="replace"))


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
        return _of_script(Path(options.script), job, settings)
    refuse_named_model_of_another_size(options.tier, settings)
    job = {**name_of_tier(options.tier), **job}
    return fitted(script_of_tier(options.tier), job, variables_of_tier(options.tier), settings, site_variables())


def _of_script(path: Path, job: dict[str, str], settings: Sequence[str]) -> Submission:
    """Return the submission of a script that the user has: its header stays, and the job's options come before it."""
    if not path.is_file():
        raise ConfigError([f"script={path}: no such file. Fix: rm-scale slurm render --tier 13b writes one."])
    site = site_variables()
    header = read_header(path.read_text(encoding="utf-8", errors="replace"))
    if "gpus-per-node" in job:
        count = job.pop("gpus-per-node")
        job |= gpu_options(count, site)
    job |= fitting_grace({**environment_options(site), **job}, header)
    return Submission(job, {}, path, tuple(settings))


def fitted(
    script: Path, job: dict[str, str], variables: dict[str, str], settings: Sequence[str], site: Mapping[str, str]
) -> Submission:
    """Return the submission of a shipped script, with a header of its own where the site or the job needs one.

    Args:
        script: the shipped script.
        job: sbatch's options.
        variables: for the job, besides the environment.
        settings: for `rm_scale/train.py`.
        site: variables of `site.env` and the environment.

    Raises:
        ConfigError: what the site or the job asks for can't be used.
    """
    header = read_header(script.read_text(encoding="utf-8"))
    job = {**job, **fitting_grace(options_before_script(site, job), header)}
    changes = header_changes(header, job, site)
    if not changes.of_site and not changes.dropped & set(header):
        return Submission(job, variables, script, tuple(settings))
    text = render(script, job, variables, settings, site)
    over_environment = named_by_environment(job, site) & set(read_header(text))
    return Submission(job, variables, script, tuple(settings), text, over_environment)


def send(submission: Submission, test_only: bool = False, dry_run: bool = False) -> int:
    """Print the command and run it.

    Raises:
        UserError: there is no Slurm here, or it refused.
    """
    command = submission.command(*(["--test-only"] if test_only else []))
    site = site_variables()
    for problem in unknown_variables(site):
        print(f"warning: {problem}", file=sys.stderr)
    asked = {**submission.header(), **environment_options(site), **submission.options}
    folders = log_folders(asked)
    if submission.text is not None:
        print(f"the script is {submission.script}, its header as slurm/site.env and the options want it:")
        print("\n".join(line for line in submission.text.splitlines() if line.startswith("#SBATCH")))
        print("which this command reads on its standard input (rm-scale slurm render writes it into a file):")
    print(shlex.join(command), flush=True)
    if dry_run:
        return 0
    if not test_only:
        make_folders(folders)
    answer = call_slurm(command, site, submission.text)
    return _answered(answer, asked, test_only)


def _answered(answer: subprocess.CompletedProcess[str], asked: Mapping[str, str], test_only: bool) -> int:
    told = answer.stderr.strip()
    if answer.returncode != 0:
        limits = waiting.partition_limits(asked.get("partition", ""), _ask)
        raise UserError(
            f"sbatch refused the job: {told or answer.stdout.strip()}"
            + (f" ({limits})" if limits else "")
            + ". Fix: change what it names, and try again."
        )
    if test_only:
        print(told or "sbatch would take it")
        return 0
    job = answer.stdout.strip().split(";")[0]
    if not job.isdigit():
        raise UserError(f"sbatch answered {answer.stdout.strip()!r}, not a job's number. Fix: look at squeue --me.")
    if told:
        print(told)
    stands = waiting.outlook(job, waiting.first_look(job, _ask), _ask)
    print(f"job {job} {stands}\nwatch it: rm-scale slurm status {job}")
    return 0


# --- The folder of the log -------------------------------------------------------------------------------------------


def log_folders(options: Mapping[str, str]) -> list[Path]:
    """Return the folders that hold the job's log; Slurm makes none, and a job without one ends without a word.

    Args:
        options: of the header and of the command.

    Raises:
        UserError: a folder's name is known only once the job runs.
    """
    found = []
    for name in ("output", "error"):
        folder, slash, _ = options.get(name, "").rpartition("/")
        if "%" in folder:
            raise UserError(
                f"{'log' if name == 'output' else name}={options[name]}: the folder must have no % pattern: Slurm "
                "makes no folders, and this one's name is known only when the job starts. Fix: the pattern in the "
                "file's name, such as logs/%x-%j.log."
            )
        if slash:
            found.append(Path(options.get("chdir", "."), folder or "/"))
    return found


def make_folders(folders: Sequence[Path]) -> None:
    """Make the folders that are missing, and say so.

    Raises:
        UserError: one can't be made.
    """
    for folder in folders:
        if folder.is_dir():
            continue
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"log={folder}/: the folder is not there and can't be made ({error.strerror}). Fix: another --log."
            ) from error
        print(f"made the folder of the log: {folder}")


# --- Slurm's commands ------------------------------------------------------------------------------------------------


def call_slurm(
    command: Sequence[str], environ: Mapping[str, str] | None = None, text: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Args:
        command: its words.
        environ: its environment; ours by default.
        text: for its standard input.

    Raises:
        UserError: it is not there, or does not answer.
    """
    given: dict[str, Any] = {"stdin": subprocess.DEVNULL} if text is None else {"input": text}
    try:
        return subprocess.run(
            command, env=environ or os.environ, capture_output=True, text=True, check=False, timeout=120, **given
        )
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} was not found: there is no Slurm here. Fix: log in to the cluster; without Slurm, "
            "rm-scale launch starts runs here or over a hostfile."
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer in 120 s. Fix: scontrol ping says whether Slurm is up.") from None


def _ask(command: Sequence[str]) -> str:
    """Return what a command of Slurm's prints; nothing where it fails: the job was handed over, or refused, before."""
    try:
        answer = call_slurm(command)
    except UserError:
        return ""
    return answer.stdout if answer.returncode == 0 else ""
