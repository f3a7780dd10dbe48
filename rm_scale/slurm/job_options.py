"""Options of a Slurm job, checked so that no value can become another option or a command."""

from __future__ import annotations

import argparse
import re
import shlex
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
SHORT_OPTIONS = {
    **{"a": "array", "A": "account", "b": "begin", "B": "extra-node-info", "c": "cpus-per-task", "C": "constraint"},
    **{"d": "dependency", "D": "chdir", "e": "error", "F": "nodefile", "G": "gpus", "H": "hold", "i": "input"},
    **{"J": "job-name", "k": "no-kill", "L": "licenses", "m": "distribution", "M": "clusters", "n": "ntasks"},
    **{"N": "nodes", "o": "output", "O": "overcommit", "p": "partition", "q": "qos", "s": "oversubscribe"},
    **{"S": "core-spec", "t": "time", "w": "nodelist", "W": "wait", "x": "exclude"},
}
OF_ONE_COMMAND = frozenset(
    (
        *("array", "dependency", "export", "export-file", "get-user-env", "gid", "hold", "ntasks", "ntasks-per-node"),
        *("open-mode", "parsable", "quiet", "test-only", "uid", "wait", "wrap"),
    )
)
"""Options that the scripts depend on, that change what sbatch answers, or that belong to one job."""

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


def sbatch_options_among(words: Sequence[str], after_script: bool) -> list[str]:
    """Return a sentence for each option of sbatch among the settings of a run, where sbatch does not read it.

    A name that is also a setting of a run is the setting.

    Args:
        words: command line of `rm_scale/train.py`, as typed after the job script or after our own command.
        after_script: they were typed after the job script, as sbatch's words.
    """
    from rm_scale.config import RunConfig

    def flag_of(word: str) -> str:
        name = word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""
        return _FLAGS.get(name, "") if name not in RunConfig.model_fields else ""

    found = []
    for place, word in enumerate(words):
        before, after = words[place - 1] if place else "", words[place + 1] if place + 1 < len(words) else ""
        flag, value = flag_of(word), word.partition("=")[2]
        is_value = before.startswith("--") and "=" not in before and not flag_of(before)
        if re.fullmatch(r"-[A-Za-z][\w:.,%-]*", word, re.ASCII) and not is_value:
            flag, value = SHORT_OPTIONS.get(word[1], ""), word[2:]
        if flag:
            value = value if value or after.startswith("-") else after
            found.append(_misplaced(word, flag, value, after_script))
    return found


_FLAGS = {name.replace("-", "_"): name for name in SBATCH_OPTIONS}
_FLAGS |= {option.name: option.flag for option in JOB_OPTIONS}
"""sbatch's names of its options, by those that people type, with _ in the place of -."""


def _misplaced(word: str, flag: str, value: str, after_script: bool) -> str:
    typed = one_line(word, 80)
    seconds = re.search(r"\d+$", value)
    if flag == "signal" and seconds is not None:
        value = seconds[0] if not after_script else f"B:USR1@{seconds[0]}"
    option = f"--{flag}" + (f"={value}" if value else "")
    ours = next((option.name for option in JOB_OPTIONS if option.flag == flag), None)
    if after_script:
        problem = "is an option of sbatch, which reads none after the script"
        fix = f"write it before the script (sbatch {_shell_word(option)} SCRIPT)"
        fix += "" if flag in OF_ONE_COMMAND else ", or into RM_SCALE_SBATCH_OPTIONS of slurm/site.env"
    else:
        problem = "is an option of sbatch, and no setting of a run"
        if ours is not None:
            fix = f"--{ours} {_shell_word(value)}" if value else f"--{ours} VALUE"
        elif flag in OF_ONE_COMMAND:
            fix = "leave it out: rm_scale sets it, or it belongs to sbatch's own command"
        else:
            fix = f"RM_SCALE_SBATCH_OPTIONS={_shell_word(option)}, in the environment or slurm/site.env"
    return f"{typed}: {problem}. Fix: {fix}."


def _shell_word(text: str) -> str:
    return shlex.quote(one_line(text, 80))
