"""Requests to stop: signals, a STOP file and the wall clock.

The handlers of signals are installed before torch is imported, which takes seconds: a signal in that time would end
the rank without a trace. So nothing heavy is imported here. `rm_scale.training.agreed_stop` lets the ranks agree.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import FrameType

EXIT_REQUEUE = 85
"""Exit code of a run that stopped on request after a whole checkpoint was saved: start it again."""

STOP_FILE = "STOP"

FLOOR_SECONDS, FLOOR_SHARE = 60.0, 0.25
"""A checkpoint is begun at least this long before the job's time is up, unless `stop_margin_seconds` is set.

Of a limit of less than four minutes it is a share, or a short job would save as soon as it has started.
"""

END_FILE_SECONDS = 2.0
"""The file that says when the job's time is up is read at most this often."""

_LATEST_TIME = 253_402_300_800.0  # the year 10000

_times_in_files: dict[str, tuple[float, float | None]] = {}


class StopReason(IntEnum):
    """Why a run is to stop. When there are several reasons, the largest counts."""

    NONE = 0
    WALL_CLOCK = 1
    STOP_FILE = 2
    SIGUSR1 = 3
    SIGTERM = 4

    @property
    def text(self) -> str:
        """The reason in words, for logs and records."""
        return {1: "wall clock", 2: "STOP file", 3: "SIGUSR1", 4: "SIGTERM"}.get(int(self), "none")


_SIGNALS: dict[int, StopReason] = {signal.SIGUSR1: StopReason.SIGUSR1, signal.SIGTERM: StopReason.SIGTERM}
_received: dict[StopReason, float] = {}

FIRST_ATTEMPT_SIGNAL, NUM_ATTEMPT_SIGNALS = 40, 20
"""Real-time signals by which a Slurm job's script asks the ranks of one attempt to stop (`slurm/common/signals.sh`).

A request that is still on its way when Slurm starts the job again must not stop the next attempt: it has another
number. The C library keeps 32 and 33 for itself.
"""


def attempt_signal(attempt: int) -> int:
    """Return the signal that asks the ranks of a Slurm job's attempt to stop, and no other attempt's.

    Args:
        attempt: how often the job was restarted before.
    """
    return FIRST_ATTEMPT_SIGNAL + attempt % NUM_ATTEMPT_SIGNALS


def ignore_attempt_signals() -> None:
    """Ignore the signals of all attempts, here and in processes started from now on."""
    for attempt in range(NUM_ATTEMPT_SIGNALS):
        signal.signal(attempt_signal(attempt), signal.SIG_IGN)


def watch_signals(environ: Mapping[str, str] | None = None) -> None:
    """Remember SIGUSR1, SIGTERM and this attempt's own signal instead of dying of them.

    Outside the main thread, do nothing.

    Args:
        environ: `RM_SCALE_ATTEMPT` in it names the attempt of a job that was started by the job scripts.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        signal.signal(number, _remember)
    attempt = (os.environ if environ is None else environ).get("RM_SCALE_ATTEMPT", "")
    if attempt.isascii() and attempt.isdigit():
        ignore_attempt_signals()
        signal.signal(attempt_signal(int(attempt)), _remember)


def _remember(number: int, frame: FrameType | None) -> None:
    """Note the time, and nothing else: a handler runs between any two instructions, in the middle of a step."""
    _received.setdefault(_SIGNALS.get(number, StopReason.SIGUSR1), time.time())


def received_signal() -> StopReason:
    """Return the signal that this process has got, `NONE` without one."""
    return max(_received, default=StopReason.NONE)


def received_at() -> float | None:
    """Return when the first signal came, in unix seconds; `None` without one."""
    return min(_received.values(), default=None)


def forget_signals() -> None:
    """Forget all signals, for another run in this process."""
    _received.clear()


# --- The job's time --------------------------------------------------------------------------------------------------


def end_time(environ: Mapping[str, str] | None = None) -> float | None:
    """Return when this job's time is up, in Unix seconds, `None` when that is not known.

    An administrator may move the end of a running job: the file named by `RM_SCALE_END_TIME_FILE` counts, or what it
    held when it could be read last; else `RM_SCALE_END_TIME`, else Slurm's `SLURM_JOB_END_TIME`. What holds no such
    number is ignored: it is only a hint, and no reason to end a run.
    """
    env = os.environ if environ is None else environ
    path = env.get("RM_SCALE_END_TIME_FILE")
    found = _time_in(path) if path else None
    for name in ("RM_SCALE_END_TIME", "SLURM_JOB_END_TIME"):
        found = _as_time(env.get(name, "")) if found is None else found
    return found


def time_limit(environ: Mapping[str, str] | None = None) -> float | None:
    """Return how many seconds this attempt has in all, `None` when its begin (`RM_SCALE_START_TIME`) or end is unknown.

    It grows and shrinks as the end is moved.
    """
    began, ends = start_time(environ), end_time(environ)
    return ends - began if began is not None and ends is not None and ends > began else None


def start_time(environ: Mapping[str, str] | None = None) -> float | None:
    """Return when this attempt of the job began, in Unix seconds, `None` when `RM_SCALE_START_TIME` does not say."""
    return _as_time((os.environ if environ is None else environ).get("RM_SCALE_START_TIME", ""))


def _time_in(path: str) -> float | None:
    """Return the time that a file holds, or held last; `None` where it never could be read.

    It is read anew every `END_FILE_SECONDS`. A disk that is away for a moment must not bring back the end that was
    moved.
    """
    read_at, found = _times_in_files.get(path, (-math.inf, None))
    if time.monotonic() - read_at >= END_FILE_SECONDS:
        with suppress(OSError, ValueError), open(path, "rb") as file:
            # Opened each time: on a network's disk that alone shows what others wrote.
            held = _as_time(file.read(64).decode("ascii", errors="replace"))
            found = found if held is None else held
        _times_in_files[path] = (time.monotonic(), found)
    return found


def _as_time(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < _LATEST_TIME else None


def floor_seconds(limit: float | None) -> float:
    """Return the least time before the limit at which a run stops by itself: of a short limit, a share."""
    return FLOOR_SECONDS if limit is None else min(FLOOR_SECONDS, limit * FLOOR_SHARE)


def spare_seconds(limit: float | None) -> float:
    """Return the time that is left for the processes to end in: ten seconds, less where the limit is short."""
    return floor_seconds(limit) / 6


def margin_seconds(asked: float | None, save_seconds: float, step_seconds: float, limit: float | None = None) -> float:
    """Return how long before the job's time is up a checkpoint must be begun.

    Args:
        asked: the setting `stop_margin_seconds`, if given.
        save_seconds: the longest save so far, else the one that is expected; 0 when nothing is known.
        step_seconds: the longest of the last steps.
        limit: what this attempt has in all, if that is known.

    Returns:
        Seconds: enough for a save twice as slow as any so far and for two more steps (the clock is read between steps).
    """
    if asked is not None:
        return asked
    return max(floor_seconds(limit), 2 * save_seconds + 2 * step_seconds + spare_seconds(limit))


def goes_on_for_a_step(left: float | None, margin: float, needed: float, limit: float | None) -> bool:
    """Tell whether a request to stop that comes before an attempt's first step waits for that step.

    An attempt that stops without a step has used its time for nothing, and so would all that follow it under the same
    limit. Only a SIGUSR1 and the wall clock wait: a SIGTERM means now, and so does a person's STOP file.

    Args:
        left: seconds until the job's time is up, `None` when that is not known: then there may be none.
        margin: see `margin_seconds`.
        needed: seconds that a step and a save take at the least, and the processes to end.
        limit: what this attempt has in all. Known, it tells that the next one has no more; unknown, the margin counts.
    """
    if left is None:
        return False
    return left > margin or (limit is not None and left > needed)


def reason_now(output_dir: Path) -> StopReason:
    """Return what asks this process to stop now, apart from the clock; only rank 0 should look at the file."""
    reason = received_signal()
    if reason is StopReason.NONE and os.path.exists(output_dir / STOP_FILE):
        reason = StopReason.STOP_FILE
    return reason
