"""Options of a Slurm job, checked so that no value can become another option or a command."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rm_scale.errors import ConfigError
from rm_scale.texts import one_line

_NAME = r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,127}"
_NODE_LIST = r"[A-Za-z0-9][A-Za-z0-9_.,\[\]-]{0,1023}"
_ARRAY_PART = r"\d{1,7}(-\d{1,7}(:\d{1,7})?)?"
_DEPENDENCY = r"(singleton|after(any|ok|notok|corr|burstbuffer)?(:\d{1,12}(_(\d{1,7}|\*))?(\+\d{1,6})?)+)"


@dataclass(frozen=True)
class JobOption:
    """One option of a job.

    Attributes:
        name: as typed after `--`.
        flag: what sbatch calls it.
        pattern: what its whole value must match.
        rule: the pattern in plain English, for messages.
        example: a good value.
        help: what it is for.
    """

    name: str
    flag: str
    pattern: str
    rule: str
    example: str
    help: str


_SBATCH_NAMES = """
account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container
contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency
distribution error exclude exclusive export export-file extra-node-info get-user-env gid gpu-bind gpu-freq gpus
gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint hold ignore-pbs input job-name
kill-on-invalid-dep licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network
nice no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node
ntasks-per-socket open-mode output overcommit oversubscribe parsable partition power prefer priority profile
propagate qos quiet reboot requeue reservation signal sockets-per-node spread-job switches test-only thread-spec
threads-per-core time time-min tmp tres-per-task uid use-min-nodes wait wait-all-nodes wckey wrap
"""
SBATCH_OPTIONS = frozenset(_SBATCH_NAMES.split())
"""Long options of sbatch (22.05 to 24.11), by which words after a script are recognised as meant for it."""
_SHORT_OPTIONS = "aAbBcCdDeFGHiJkLmMnNoOpqstwWxS"

_WORD_RULE = "letters, digits and . _ @ -, beginning with a letter or digit"
JOB_OPTIONS = (
    JobOption("nodes", "nodes", r"[1-9]\d{0,4}", "a whole number from 1", "2", "nodes"),
    JobOption("gpus", "gpus-per-node", r"\d{1,3}", "a whole number", "8", "GPUs on each node"),
    JobOption("job_name", "job-name", _NAME, _WORD_RULE, "rm_13b", "name of the job"),
    JobOption("account", "account", _NAME, _WORD_RULE, "my_project", "who is charged"),
    JobOption(
        "partition", "partition", rf"{_NAME}(,{_NAME})*", f"names of {_WORD_RULE}", "gpu", "partition, or several"
    ),
    JobOption("qos", "qos", _NAME, _WORD_RULE, "normal", "quality of service"),
    JobOption("reservation", "reservation", _NAME, _WORD_RULE, "my_days", "reserved nodes"),
    JobOption(
        "constraint",
        "constraint",
        r"[A-Za-z0-9\[(][A-Za-z0-9_.&|,*:()\[\]-]{0,255}",
        "features of nodes joined by & or |",
        "h100",
        "features that nodes must have",
    ),
    JobOption("nodelist", "nodelist", _NODE_LIST, "names of nodes", "node[1-4]", "these nodes"),
    JobOption("exclude", "exclude", _NODE_LIST, "names of nodes", "node3", "not these nodes"),
    JobOption(
        "time",
        "time",
        r"\d{1,6}(:\d{1,2}){0,2}|\d{1,4}-\d{1,2}(:\d{1,2}){0,2}",
        "minutes, H:MM:SS or D-HH:MM:SS",
        "24:00:00",
        "time limit of each attempt",
    ),
    JobOption(
        "array",
        "array",
        rf"{_ARRAY_PART}(,{_ARRAY_PART})*(%\d{{1,5}})?",
        "task numbers such as 0-3 or 0,4,5%2",
        "0-3",
        "tasks: seeds, or lines of RM_SCALE_SWEEP",
    ),
    JobOption(
        "dependency",
        "dependency",
        rf"{_DEPENDENCY}([,?]{_DEPENDENCY})*",
        "conditions such as afterok:123 or singleton",
        "afterok:123",
        "jobs to wait for",
    ),
    JobOption("grace", "signal", r"[1-9]\d{0,4}", "seconds from 1", "600", "seconds before the time limit to save"),
    JobOption(
        "log",
        "output",
        r"[A-Za-z0-9_./%@+=][A-Za-z0-9_./%@+=-]{0,1023}",
        "a path of letters, digits and . _ / % @ + = -",
        "%x-%j.log",
        "the job's log; its folder is made when the job is submitted",
    ),
)


def add_job_options(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """Add the options to a parser, as text that `sbatch_options` checks."""
    group = parser.add_argument_group("Slurm job")
    for option in JOB_OPTIONS:
        if option.name not in without:
            group.add_argument(f"--{option.name}", metavar=option.example, help=option.help)


def sbatch_options(options: argparse.Namespace, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the options that the user gave, by sbatch's names, without those named in `without`.

    Raises:
        ConfigError: values that must not reach sbatch or a script's header; all of them are listed.
    """
    problems: list[str] = []
    found: dict[str, str] = {}
    for option, value in _given(options):
        if option.name in without:
            continue
        if re.fullmatch(option.pattern, value, re.ASCII) is None:
            problems.append(
                f"{option.name}={value!r}: must be {option.rule}. Fix: such as --{option.name} {option.example}."
            )
        else:
            found[option.flag] = f"B:USR1@{value}" if option.flag == "signal" else value
    if problems:
        raise ConfigError(problems, heading="the job can't be submitted so")
    return found


def _given(options: argparse.Namespace) -> Iterator[tuple[JobOption, str]]:
    for option in JOB_OPTIONS:
        value = getattr(options, option.name, None)
        if value is not None:
            yield option, str(value)


def sbatch_options_among(words: Sequence[str]) -> list[str]:
    """Return a sentence for each option of sbatch among the words after a script, where sbatch does not read it.

    A name that is also a setting of a run is the setting.

    Args:
        words: command line of `rm_scale/train.py`, as typed after the job script.
    """
    from rm_scale.config import RunConfig

    own = {option.name: option.flag for option in JOB_OPTIONS}
    found = []
    for place, word in enumerate(words):
        name, _, value = word[2:].partition("=") if word.startswith("--") else ("", "", "")
        if name.replace("-", "_") in RunConfig.model_fields:
            continue
        before = words[place - 1] if place else ""
        if name.replace("_", "-") in SBATCH_OPTIONS or own.get(name.replace("-", "_")):
            flag = own.get(name.replace("-", "_"), name.replace("_", "-"))
            value = f"B:USR1@{value}" if value.isdigit() and flag == "signal" else value
            found.append(_misplaced(word, f"--{flag}" + (f"={value}" if value else "")))
        elif re.fullmatch(rf"-[{_SHORT_OPTIONS}][\w:.,%-]*", word, re.ASCII) and not _takes_value(before):
            found.append(_misplaced(word, word))
    return found


def _takes_value(word: str) -> bool:
    return word.startswith("--") and "=" not in word


def _misplaced(word: str, option: str) -> str:
    return (
        f"{one_line(word, 80)}: is an option of sbatch, which reads none after the script. Fix: write it before the "
        f"script (sbatch {one_line(option, 80)} slurm/rm_1b.sh), or into RM_SCALE_SBATCH_OPTIONS of slurm/site.env."
    )
