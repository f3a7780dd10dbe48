"""The save that a run ends with: tried again while the disk refuses it, and what follows when no time is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from rm_scale.distributed import gather_from_ranks
from rm_scale.errors import CheckpointError, DiskError
from rm_scale.logs import get_logger
from rm_scale.texts import one_line
from rm_scale.training.attempts import Attempt
from rm_scale.training.preemption import EXIT_REQUEUE, end_time

logger = get_logger(__name__)

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 30.0
"""Each pause is twice as long as the one before, up to this."""

SECONDS_WITHOUT_END = 60.0
"""So long a save is tried again where the end of the job's time is not known."""

MOST_SECONDS = 300.0
"""So long it is tried again at most: all nodes of the job wait meanwhile."""

SPARE_SECONDS = 10.0
"""What must be left of the job's time after a save that is tried again, for the processes to end."""


class LastSaveFailed(CheckpointError):
    """The save that a run was to end with can't be written, but this attempt has published an earlier checkpoint."""

    met_by = "world"


def next_pause(num_tries: int, spent: float, save_seconds: float, left: float | None) -> float | None:
    """Return how many seconds to wait before a save is tried again, `None` to give up.

    Args:
        num_tries: how often it has failed.
        spent: seconds since it failed first.
        save_seconds: how long a save takes.
        left: seconds of the job's time that are left, `None` when that is not known.
    """
    pause = min(FIRST_PAUSE_SECONDS * 2 ** min(num_tries - 1, 10), LONGEST_PAUSE_SECONDS)
    if left is None:
        return pause if spent + pause <= SECONDS_WITHOUT_END + 1.0 else None
    in_time = pause + save_seconds + SPARE_SECONDS <= left and spent + pause <= MOST_SECONDS
    return pause if in_time else None


def insist(write: Callable[[], T], what: str, save_seconds: float, beat: Callable[[str], None]) -> T:
    """Run a save until it succeeds, or until no time is left. A collective, as the save is.

    Args:
        write: the save; a `DiskError` is raised on all ranks or on none.
        what: its name, for the log.
        save_seconds: the longest save so far.
        beat: called with the place that is reached, for the watchdog.

    Raises:
        DiskError: on every rank, when the disk has refused it to the end.
    """
    num_tries, failed_at = 0, 0.0
    while True:
        began = time.monotonic()
        try:
            return write()
        except DiskError as error:
            num_tries += 1
            failed_at = failed_at or time.monotonic()
            now, ends = time.monotonic(), end_time()
            save_seconds = max(save_seconds, now - began)
            left = None if ends is None else ends - time.time()
            # Rank 0's clock decides for all: some would else wait for ever in a save that others have given up.
            pause = gather_from_ranks(next_pause(num_tries, now - failed_at, save_seconds, left))[0]
            if pause is None:
                raise
            logger.warning(f"{what} could not be written: {error} It must be; next try in {pause:.0f} s.")
        _wait(pause, beat)


def _wait(seconds: float, beat: Callable[[str], None]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        beat("waiting for room on the disk")
        time.sleep(min(1.0, left))


def give_up(what: str, error: DiskError, step: int, saved_step: int) -> LastSaveFailed:
    """Return the error that ends a run whose last save was refused to the end, with what is lost by that.

    Args:
        what: the save.
        error: why it failed.
        step: that the run has reached.
        saved_step: of the newest checkpoint of this attempt.
    """
    lost = step - saved_step
    lost_text = "no step is lost" if lost == 0 else f"{lost:,} steps are lost" if lost > 1 else "1 step is lost"
    return LastSaveFailed(
        f"{what} could not be written: {error} {lost_text.capitalize()}: the run ends at step {step} and goes on from "
        f"checkpoint-{saved_step} when it is started again with --resume_from_checkpoint auto (exit code "
        f"{EXIT_REQUEUE})."
    )


def end_training(trainer: Any, attempt: Attempt, failed: LastSaveFailed | None) -> int:
    """Return the exit code of a training that has ended, and record why when it is to be started again.

    Args:
        trainer: a `RewardTrainer`.
        attempt: this one.
        failed: what became of the save at a stop, if the disk has refused it.
    """
    reason = trainer.stopping.reason
    if not reason:
        return 0
    try:
        trainer.stopping.remove_stop_file()
    except OSError as error:
        logger.warning(f"the STOP file can't be removed ({one_line(error)}): the next attempt stops for it at once")
    if failed is not None:
        return end_with_requeue(failed, attempt)
    attempt.outcome = f"stopped: {reason.text}"
    logger.warning(f"stopped at step {trainer.state.global_step}; go on with --resume_from_checkpoint auto")
    return EXIT_REQUEUE


def end_with_requeue(failed: LastSaveFailed, attempt: Attempt) -> int:
    """Say why the run ends, record it, and return the exit code by which it is started again.

    Attempts that save nothing new are ended by `rm_scale.training.attempts.refuse_idle_restart`.
    """
    logger.warning(str(failed))
    attempt.outcome = f"stopped: {failed}"[:300]
    return EXIT_REQUEUE
