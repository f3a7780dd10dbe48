"""Stopping together: what any rank was asked becomes one decision, taken by all ranks at the end of the same step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rm_scale.distributed import max_over_ranks
from rm_scale.logs import get_logger
from rm_scale.texts import duration
from rm_scale.training.attempts import BEGAN, Attempt, read_attempts
from rm_scale.training.preemption import (
    STOP_FILE,
    StopReason,
    end_time,
    goes_on_for_a_step,
    margin_seconds,
    reason_now,
    received_at,
    spare_seconds,
    start_time,
    time_limit,
)
from rm_scale.training.recorded_times import STATE_FACTOR, RecordedTimes, recorded_times
from rm_scale.training.write_rate import ExpectedSave

logger = get_logger(__name__)


class StopOnRequest(TrainerCallback):
    """End training with a checkpoint when a signal, a STOP file or the clock asks for it.

    The reason is reduced with MAX after every step, so that ranks can't disagree on the step: a checkpoint that some
    ranks write and others don't would wait for ever.

    Args:
        args: of the run; its output directory, rank and number of ranks are used.
        margin: the setting `stop_margin_seconds`; `None`: what was measured decides.
        attempt: where stops are recorded, if at all.
        measure: tells how long a save will take where none is on record; called once, on rank 0, if at all.

    Attributes:
        reason: what all ranks have agreed to stop for.
    """

    def __init__(
        self,
        args: TrainingArguments,
        margin: float | None,
        attempt: Attempt | None,
        measure: Callable[[], ExpectedSave | None] | None = None,
    ) -> None:
        self.args = args
        self.asked_margin = margin
        self.attempt = attempt
        self.reason = StopReason.NONE
        self._measure = measure
        self._recorded: RecordedTimes | None = None  # read when the job's end is known
        self._expected_save, self._why_expected = 0.0, ""
        self._longest_save = 0.0
        self._longest_evaluation = 0.0
        self._ends: float | None = None
        self._step = attempt.step if attempt is not None else 0
        self._step_seconds: deque[float] = deque(maxlen=20)
        self._ready_at = 0.0  # when the work since the last step had ended
        self._loaded_seconds = 0.0
        self._is_first = True

    # --- The decision --------------------------------------------------------------------------------------------

    def agree(self, will_evaluate: bool = False) -> StopReason:
        """Return what all ranks stop for, `NONE` to go on. A collective.

        Args:
            will_evaluate: an evaluation follows, before the clock is read again.
        """
        goes_on = False
        if self.args.process_index == 0:
            mine, goes_on = self._look(will_evaluate)
        else:
            mine = reason_now(Path("/nonexistent"))  # file and clock are looked at by rank 0 alone
        rank = self.args.process_index if mine else -1
        reason, rank, step_first = max_over_ranks([int(mine), rank, int(goes_on)])
        self.reason = StopReason(reason)
        if self.reason in (StopReason.WALL_CLOCK, StopReason.SIGUSR1) and step_first:
            logger.warning(f"asked to stop ({self.reason.text}) before the first step: it is made, then the run stops")
            self.reason = StopReason.NONE
        if self.reason:
            self._announce(rank)
        return self.reason

    def _look(self, will_evaluate: bool) -> tuple[StopReason, bool]:
        """Return what this rank is asked, the clock included, and whether one step is made all the same."""
        mine, ends, limit = reason_now(Path(self.args.output_dir)), end_time(), time_limit()
        if ends is None:
            return mine, False
        left = ends - time.time()
        recorded = self._learn()
        save = max(self._longest_save, recorded.save or 0.0) or self._expected_save
        margin = margin_seconds(self.asked_margin, save, max(self._step_seconds, default=0.0), limit)
        self._tell_of_limit(ends, left, margin, save)
        if mine is StopReason.NONE and left < margin + (self._longest_evaluation if will_evaluate else 0.0):
            mine = StopReason.WALL_CLOCK
        needed = (recorded.to_first_step or 0.0) + save + spare_seconds(limit)
        return mine, self._is_first and goes_on_for_a_step(left, margin, needed, limit)

    def _learn(self) -> RecordedTimes:
        """Return what earlier attempts took; where none has saved, measure what a save will take."""
        if self._recorded is None:
            events = read_attempts(self.attempt.path.parent) if self.attempt is not None else []
            self._recorded = recorded_times(events)
            why = "the slowest of the last saves"
            if self._recorded.save is None and not self._longest_save and self._measure is not None:
                expected = self._measure()
                self._expected_save = expected.seconds if expected is not None else 0.0
                why = expected.reason if expected is not None else "the disk's speed can't be measured"
            self._why_expected = why
        return self._recorded

    def _tell_of_limit(self, ends: float, left: float, margin: float, save: float) -> None:
        """Log, and before the first step record, when the run will stop; log when the end is moved."""
        if self._ends is None:
            takes = f"{save:.3g} s" if save else "nobody knows how long"
            logger.info(
                f"a save is expected to take {takes} ({self._why_expected}): the run stops {margin:.3g} s before its "
                f"limit, which is in {duration(left)}"
            )
            if margin < save:
                logger.warning(
                    f"stop_margin_seconds={self.asked_margin}: a save is expected to take longer, {save:.3g} s, so the "
                    "job may be ended before it is whole. Fix: leave the setting out."
                )
        elif abs(ends - self._ends) >= 1:
            where = "later" if ends > self._ends else "earlier"
            logger.warning(
                f"the job's end was moved: it is {duration(abs(ends - self._ends))} {where}, in {duration(left)}"
            )
        if self._is_first and self._ends is None:
            began = self._began()
            self._loaded_seconds = time.time() - began
            facts = {"save_seconds": save, "margin_seconds": margin, "startup_seconds": self._loaded_seconds}
            self._note("time_limit", limit_seconds=ends - began, **facts)
        self._ends = ends

    def _began(self) -> float:
        return start_time() or BEGAN

    def _announce(self, rank: int) -> None:
        """Log and record why the run stops; only signals are sent to one rank."""
        where = f" on rank {rank}" if self.reason >= StopReason.SIGUSR1 else ""
        logger.warning(f"asked to stop ({self.reason.text}{where}): all ranks stop at step {self._step}")
        if self.attempt is not None:
            self.attempt.note("signal", self._step, reason=self.reason.text, received_at=received_at())

    # --- What the trainer tells ----------------------------------------------------------------------------------

    def note_save(self, seconds: float) -> None:
        """Note how long a save took: the next one, at a stop, may have to be begun earlier."""
        if self.args.save_only_model:
            seconds *= STATE_FACTOR  # a stop writes the training state as well
        self._longest_save = max(self._longest_save, seconds)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of the first step; the others' runs since the step before, as data is read meanwhile."""
        if self._is_first:
            self._ready_at = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agree, and let transformers save and stop. No evaluation: the time is short."""
        self._step = state.global_step
        seconds = time.monotonic() - self._ready_at
        self._step_seconds.append(seconds)
        if self._is_first:
            loaded = {"loaded_seconds": self._loaded_seconds} if self._loaded_seconds else {}
            self._note("first_step", seconds=seconds, startup_seconds=time.time() - seconds - self._began(), **loaded)
        if self.attempt is not None:
            self.attempt.step = self._step
        self._is_first = False
        if self.agree(will_evaluate=control.should_evaluate or state.global_step >= state.max_steps):
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False
        self._ready_at = time.monotonic()

    def _note(self, event: str, **seconds: float) -> None:
        """Record an event of this step with lengths of time, which the next attempt wants to know."""
        if self.attempt is not None:
            facts: dict[str, Any] = {name: round(value, 3) for name, value in seconds.items()}
            self.attempt.note(event, self._step, **facts)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note how long an evaluation took: none is begun that the job's time has no room for."""
        self._longest_evaluation = max(self._longest_evaluation, time.monotonic() - self._ready_at)
        self._ready_at = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the clock of the next step."""
        self._ready_at = time.monotonic()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do nothing of what belongs to an epoch's end when the epoch was left in its middle."""
        if self.reason:
            control.should_evaluate = False
            control.should_save = False

    def remove_stop_file(self) -> None:
        """Remove the STOP file that was obeyed, or the next attempt would stop for it again."""
        if self.reason is StopReason.STOP_FILE and self.args.process_index == 0:
            (Path(self.args.output_dir) / STOP_FILE).unlink(missing_ok=True)
