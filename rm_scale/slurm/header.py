"""The `#SBATCH` lines of a job script: read, and written as a site's way of asking for GPUs, memory and cores wants.

Clusters differ in how they are asked, and sbatch refuses lines that say one thing in two ways, such as `--mem` beside
`--mem-per-gpu`. So a line that says otherwise what was asked is left out.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rm_scale.errors import ConfigError
from rm_scale.slurm.job_options import OF_ONE_COMMAND, SBATCH_OPTIONS, SHORT_OPTIONS

_GROUPS = (
    ("gpus-per-node", "gres", "gpus", "gpus-per-task", "gpus-per-socket"),
    ("mem", "mem-per-cpu", "mem-per-gpu"),
    ("cpus-per-task", "cpus-per-gpu"),
    ("exclusive", "oversubscribe"),
    ("requeue", "no-requeue"),
)
"""Of each group one line at most: they say the same thing in different ways."""
_OF_A_GPU = ("mem-per-gpu", "cpus-per-gpu")
_OF_ENVIRONMENT = {
    **{f"SBATCH_{name.upper().replace('-', '_')}": name for group in _GROUPS for name in group},
    "SBATCH_MEM_PER_NODE": "mem",
    "SBATCH_TIMELIMIT": "time",
    "SBATCH_SIGNAL": "signal",
    "SBATCH_OUTPUT": "output",
    "SBATCH_ERROR": "error",
    "SBATCH_PARTITION": "partition",
}
"""Variables that sbatch reads as options, and that count before a script's lines."""

_SIZE = r"\d{1,9}[KMGT]?"
_RULES = {
    "RM_SCALE_GPU_REQUEST": ("gpus-per-node|gres|none", "gpus-per-node, gres or none"),
    "RM_SCALE_GPU_TYPE": (r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", "a type of gres.conf, such as a100"),
    "RM_SCALE_MEMORY": (rf"none|{_SIZE}|{_SIZE}/(gpu|core)", "none, 0, or a size such as 500G, 60G/gpu or 4G/core"),
    "RM_SCALE_CPUS": (r"none|[1-9]\d{0,4}(/gpu)?", "none, or a number of cores such as 64 or 8/gpu"),
    "RM_SCALE_EXCLUSIVE": ("yes|no", "yes or no"),
    "RM_SCALE_SBATCH_OPTIONS": (r"[^\n]*", "options such as --mail-type=END --licenses=a:1"),
}
_OPTION = re.compile(r"--([a-z][a-z-]{0,39})(=([A-Za-z0-9_./%@+=:,\[\]()&|*-]{1,1024}))?", re.ASCII)


@dataclass(frozen=True)
class Changes:
    """What becomes of a script's header.

    Attributes:
        options: lines to write, by sbatch's names; an empty value is an option without one.
        dropped: names of lines to leave out.
        of_site: the site asks for something that the shipped header does not.
    """

    options: dict[str, str] = field(default_factory=dict)
    dropped: frozenset[str] = frozenset()
    of_site: bool = False


# --- Reading ---------------------------------------------------------------------------------------------------------


def read_header(text: str) -> dict[str, str]:
    """Return the options in a script's `#SBATCH` lines; the last of a name counts, as for sbatch."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            found.update(_options_of_line(line))
        elif line.strip() and not line.startswith("#"):
            break  # sbatch reads no further than the first command
    return found


def _options_of_line(line: str) -> Iterator[tuple[str, str]]:
    try:
        words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
    except ValueError:
        return
    for place, word in enumerate(words):
        following = words[place + 1] if place + 1 < len(words) and not words[place + 1].startswith("-") else ""
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            yield name, value if equals else following
        elif re.fullmatch(r"-[A-Za-z].*", word) and word[1] in SHORT_OPTIONS:
            yield SHORT_OPTIONS[word[1]], word[2:] or following


def environment_options(site: Mapping[str, str]) -> dict[str, str]:
    """Return the options that `SBATCH_` variables give; they count before a script's lines."""
    return {name: site[variable] for variable, name in _OF_ENVIRONMENT.items() if site.get(variable)}


def named_by_environment(job: Mapping[str, str], site: Mapping[str, str]) -> frozenset[str]:
    """Return which of a job's options an `SBATCH_` variable gives, too, with another value perhaps."""
    given = environment_options(site)
    return frozenset(name for name in job if name in given or site.get(f"SBATCH_{name.upper().replace('-', '_')}"))


def options_before_script(site: Mapping[str, str], job: Mapping[str, str]) -> dict[str, str]:
    """Return the options that count before a shipped script's lines: the site's, the environment's, then the job's."""
    return {**_further(site), **environment_options(site), **job}


# --- What a site asks for --------------------------------------------------------------------------------------------


def check_site(site: Mapping[str, str]) -> None:
    """Refuse variables of `site.env` that no header can be written from.

    Raises:
        ConfigError: all of them.
    """
    problems = [
        f"{name}={site[name]!r}: must be {rule}. Fix: correct it in slurm/site.env or the environment."
        for name, (pattern, rule) in _RULES.items()
        if site.get(name) and re.fullmatch(pattern, site[name], re.ASCII) is None
    ]
    problems += [
        f"RM_SCALE_SBATCH_OPTIONS: {word!r} must be an option of sbatch written --name or --name=value, without "
        "spaces or quotes in the value. Fix: correct it in slurm/site.env."
        for word in _words(site)
        if (found := _OPTION.fullmatch(word)) is None or found[1] not in SBATCH_OPTIONS
    ]
    problems += [
        f"RM_SCALE_SBATCH_OPTIONS: {word!r} is set by rm_scale, or by each job. Fix: leave it out."
        for word in _words(site)
        if word[2:].partition("=")[0] in OF_ONE_COMMAND
    ]
    if site.get("RM_SCALE_GPU_REQUEST") == "none":
        problems += [
            f"{name}={site[name]!r} with RM_SCALE_GPU_REQUEST=none: Slurm counts no GPUs there. Fix: {fix}."
            for name, fix in (("RM_SCALE_MEMORY", "0, or a size"), ("RM_SCALE_CPUS", "a number of cores, or none"))
            if site.get(name, "").endswith("/gpu")
        ]
    if problems:
        raise ConfigError(problems, heading="the job can't be submitted so")


def _words(site: Mapping[str, str]) -> list[str]:
    return site.get("RM_SCALE_SBATCH_OPTIONS", "").split()


def gpu_options(count: str, site: Mapping[str, str]) -> dict[str, str]:
    """Return the option that asks for this many GPUs on each node as the site wants it; none where nobody asks."""
    request, kind = site.get("RM_SCALE_GPU_REQUEST") or "gpus-per-node", site.get("RM_SCALE_GPU_TYPE", "")
    if count == "0" or request == "none":
        return {}
    typed = f"{kind}:{count}" if kind else count
    return {"gres": f"gpu:{typed}"} if request == "gres" else {"gpus-per-node": typed}


def header_changes(script: Mapping[str, str], job: Mapping[str, str], site: Mapping[str, str]) -> Changes:
    """Return how a script's header becomes one that asks as the site and the job want.

    Args:
        script: the header as shipped, from `read_header`.
        job: options of this job by sbatch's names, which count most; `gpus-per-node` is a plain number.
        site: the variables of `site.env`, and those of the environment.

    Raises:
        ConfigError: a variable of the site can't be used.
    """
    check_site(site)
    job = dict(job)
    asked_gpus = job.pop("gpus-per-node", None)
    options: dict[str, str] = {}
    dropped: set[str] = set()
    gpus = gpu_options(asked_gpus or script.get("gpus-per-node", "0"), site)
    if asked_gpus or site.get("RM_SCALE_GPU_REQUEST") or site.get("RM_SCALE_GPU_TYPE"):
        options |= gpus
        dropped |= {name for name in _GROUPS[0] if name not in gpus}
        dropped |= set(_OF_A_GPU) if not gpus else set()
    if site.get("RM_SCALE_GPU_REQUEST") == "none" and "mem-per-gpu" in script:
        options["mem"] = "0"  # whole nodes are given there, with their memory only where it is asked for
    _memory_and_cores(site, options, dropped)
    for further in (_further(site), job):
        for name, value in further.items():
            for other in _same_group(name):
                options.pop(other, None)
            options[name] = value
    environment = environment_options(site)
    for name in [*options, *environment]:
        dropped |= _same_group(name)
    dropped -= set(options)
    return Changes(options, frozenset(dropped), any(site.get(name) for name in _RULES))


def _memory_and_cores(site: Mapping[str, str], options: dict[str, str], dropped: set[str]) -> None:
    memory, cores = site.get("RM_SCALE_MEMORY", ""), site.get("RM_SCALE_CPUS", "")
    for group in (_GROUPS[1] if memory else (), _GROUPS[2] if cores else ()):
        for name in group:
            options.pop(name, None)
            dropped.add(name)
    if memory and memory != "none":
        size, _, each = memory.partition("/")
        options[{"": "mem", "gpu": "mem-per-gpu", "core": "mem-per-cpu"}[each]] = size
    if cores and cores != "none":
        count, _, each = cores.partition("/")
        options["cpus-per-gpu" if each else "cpus-per-task"] = count
    if site.get("RM_SCALE_EXCLUSIVE") == "yes":
        options["exclusive"] = ""
    elif site.get("RM_SCALE_EXCLUSIVE") == "no":
        dropped.add("exclusive")


def _further(site: Mapping[str, str]) -> dict[str, str]:
    found = (_OPTION.fullmatch(word) for word in _words(site))
    return {match[1]: match[3] or "" for match in found if match}


def _same_group(name: str) -> set[str]:
    return {other for group in _GROUPS if name in group for other in group if other != name}


# --- Writing ---------------------------------------------------------------------------------------------------------


def with_header(lines: Sequence[str], changes: Changes) -> list[str]:
    """Return a script's lines with the changes made: a new line stands where one that said the same did."""
    left = dict(changes.options)
    out: list[str] = []
    for place, line in enumerate(lines):
        name = _name(line)
        if name in changes.dropped:
            out += [_line(other, left.pop(other)) for other in list(left) if name in _same_group(other)]
        elif name in left:
            out.append(_line(name, left.pop(name)))
        elif not _explains_what_is_gone(lines, place, changes):
            out.append(line)
    last = max(number for number, line in enumerate(out) if line.startswith("#SBATCH"))
    out[last + 1 : last + 1] = [_line(name, value) for name, value in left.items()]
    return out


def _name(line: str) -> str:
    return re.split(r"[=\s]", line.removeprefix("#SBATCH --"))[0] if line.startswith("#SBATCH --") else ""


def _line(name: str, value: str) -> str:
    return f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}"


def _explains_what_is_gone(lines: Sequence[str], place: int, changes: Changes) -> bool:
    """Tell whether a line is a comment on the line below it, which is left out or says something else now."""
    below = lines[place + 1] if place + 1 < len(lines) else ""
    if not lines[place].startswith("# ") or not below.startswith("#SBATCH --"):
        return False
    name = _name(below)
    return name in changes.dropped or (name in changes.options and _line(name, changes.options[name]) != below)
