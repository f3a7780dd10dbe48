"""What the attempts of a run took, read from its record: start-up, a step, a save, and the limit of a job's time.

No torch here: it is read on login nodes too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rm_scale.json_values import as_mapping, as_number
from rm_scale.training.preemption import spare_seconds

STATE_FACTOR = 4.0
"""A checkpoint to resume from is this many times as large as one of the weights alone: 16 bytes a parameter, and 4."""

_NUM_LAST_SAVES = 5
"""So many saves count: one that a busy disk made slow long ago does not for ever."""


@dataclass(frozen=True)
class RecordedTimes:
    """Seconds, each `None` where it is not on record.

    Attributes:
        limit: what the last attempt had in all.
        margin: so long before its limit it was to stop.
        startup: until the first step began, in the last attempt that got so far, else until model and data were loaded.
        step: the first step of an attempt, which is the slowest.
        to_first_step: from where model and data are loaded to the end of that step.
        save: the slowest of the last saves.
        expected_save: what was expected where there was none.
    """

    limit: float | None = None
    margin: float | None = None
    startup: float | None = None
    step: float | None = None
    to_first_step: float | None = None
    save: float | None = None
    expected_save: float | None = None

    @property
    def are_too_long(self) -> bool:
        """Whether start-up, a step and a save take as long as the limit, or nothing is left beside the margin."""
        if self.limit is None or self.startup is None:
            return False
        work = (self.step or 0.0) + (self.save or self.expected_save or 0.0) + spare_seconds(self.limit)
        return self.startup + max(work, self.margin or 0.0) >= self.limit

    def text(self) -> str:
        """Return the times in words, with what is wrong where they are too long, and a space; empty without a limit."""
        if self.limit is None:
            return ""
        if self.startup is None:
            return f"It was still starting up, and its time limit was {self.limit:.0f} s. "
        parts = [f"start-up takes {self.startup:.0f} s"]
        parts.append(f"a step {self.step:.3g} s" if self.step is not None else "no step was completed")
        save = self.save if self.save is not None else self.expected_save
        if save is not None:
            parts.append(f"a save {'' if self.save is not None else 'about '}{save:.3g} s")
        margin = f", the run stops {self.margin:.0f} s before it" if self.margin is not None else ""
        verdict = "The time limit is too short: " if self.are_too_long else "Of the time limit: "
        return f"{verdict}{', '.join(parts)}, limit {self.limit:.0f} s{margin}. "


def recorded_times(events: Sequence[dict[str, Any]]) -> RecordedTimes:
    """Return what the attempts of a run took.

    Args:
        events: of the run, oldest first, as `rm_scale.training.attempts.read_attempts` returns them.
    """
    limits = [event for event in events if _seconds(event, "limit_seconds") is not None]
    firsts = [event for event in events if event["event"] == "first_step" and "startup_seconds" in event]
    saves = [_save_seconds(event) for event in events if event["event"] == "saved"]
    known = [event for event in limits if event["event"] == "time_limit"]
    limit, first = (known or limits or [{}])[-1], (firsts or [{}])[-1]
    startup = _seconds(first, "startup_seconds")
    step, loaded = _seconds(first, "seconds"), _seconds(first, "loaded_seconds")
    return RecordedTimes(
        limit=_seconds((limits or [{}])[-1], "limit_seconds"),
        margin=_seconds(limit, "margin_seconds"),
        startup=_seconds(limit, "startup_seconds") if startup is None else startup,
        step=step,
        to_first_step=None if startup is None or loaded is None else max(0.0, startup - loaded) + (step or 0.0),
        save=max([seconds for seconds in saves if seconds is not None][-_NUM_LAST_SAVES:], default=None),
        expected_save=_seconds(limit, "save_seconds"),
    )


def _seconds(event: dict[str, Any], name: str) -> float | None:
    value = as_number(event.get(name))
    return value if value is not None and value >= 0 else None


def _save_seconds(event: dict[str, Any]) -> float | None:
    """Return how long the checkpoint of a stop takes by an event `saved`, which may be of the weights alone."""
    seconds, parts = _seconds(event, "seconds"), as_mapping(event.get("parts"))
    return seconds * STATE_FACTOR if seconds is not None and parts and "state" not in parts else seconds
