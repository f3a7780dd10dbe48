"""Slurm's time limits in seconds, and how long before the end of one a job is told to save."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rm_scale.errors import ConfigError

_LEAST_GRACE = 60
"""Slurm signals within a minute of the moment that was asked for."""


def seconds_of(text: str) -> int | None:
    """Return a time limit as sbatch and squeue write it, in seconds; `None` for none, such as UNLIMITED."""
    days, dash, rest = text.strip().rpartition("-")
    if not re.fullmatch(r"\d{1,9}(:\d{1,9}){0,2}", rest, re.ASCII) or (dash and not re.fullmatch(r"\d{1,9}", days)):
        return None
    parts = [int(part) for part in rest.split(":")]
    if dash:  # D-H, D-H:M, D-H:M:S
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(parts) == 3:  # H:M:S
        return (parts[0] * 60 + parts[1]) * 60 + parts[2]
    return parts[0] * 60 + (parts[1] if len(parts) == 2 else 0)  # M, M:S


def grace_of(signal: str) -> int | None:
    """Return the seconds of sbatch's `--signal=B:USR1@600`; 60 where it names none, `None` without a signal."""
    found = re.fullmatch(r"([BR]+:)?\w+(@(\d{1,9}))?", signal, re.ASCII)
    return int(found[3] or 60) if found else None


def fitting_grace(asked: Mapping[str, str], script: Mapping[str, str]) -> dict[str, str]:
    """Return the option that shortens the script's grace where its limit is short: at most a quarter of the limit.

    A job that is told to save ten minutes before the end of a limit of ten minutes would never train a step.

    Args:
        asked: sbatch's options that count before the script's: the command's, and those of SBATCH_ variables.
        script: those in the script's header.

    Raises:
        ConfigError: the grace is as long as the limit, or longer.
    """
    limit = seconds_of(asked.get("time", script.get("time", "")))
    if not limit:
        return {}
    own = "signal" in asked
    grace = grace_of(asked["signal"] if own else script.get("signal", ""))
    if grace is None:
        return {}
    if not own:
        grace = min(grace, max(_LEAST_GRACE, limit // 4))
    if grace >= limit:
        raise ConfigError(
            [
                f"grace={grace}: must be shorter than the time limit, which is {limit} s: the job would be told to "
                f"save as soon as it starts. Fix: a longer --time, or --grace {max(1, limit // 4)}."
            ],
            heading="the job can't be submitted so",
        )
    shipped = grace_of(script.get("signal", ""))
    return {} if own or grace == shipped else {"signal": f"B:USR1@{grace}"}
