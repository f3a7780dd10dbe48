"""Check the settings of a job before it is sent: what can't be read now can't be read after hours in the queue."""

from __future__ import annotations

from collections.abc import Sequence

from rm_scale.config_parsing import parse_config
from rm_scale.errors import ConfigError
from rm_scale.slurm.job_options import sbatch_options_among


def check_names(settings: Sequence[str]) -> None:
    """Refuse misspelt settings, impossible values and misplaced options of sbatch now rather than hours later.

    Raises:
        ConfigError: all of them. What is only missing may come from the script's configuration.
    """
    misplaced = sbatch_options_among(settings, after_script=False)
    names = {message.partition(":")[0].partition("=")[0].lstrip("-").replace("-", "_") for message in misplaced}
    parsed = parse_config(settings)
    unreadable = ("no such setting", "expected a --flag", "can't be read", "not valid YAML")
    bad = [
        problem
        for problem in parsed.problems
        if any(text in problem for text in unreadable)
        or any(problem.startswith(f"{name}=") for name in parsed.broken)
        or problem.startswith("force")
    ]
    # A misplaced option is no such setting either, and was told as what it is.
    bad = [problem for problem in bad if problem.partition(":")[0].partition("=")[0].lstrip("-") not in names]
    if misplaced or bad:
        raise ConfigError([*misplaced, *bad])
