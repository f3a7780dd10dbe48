"""Stopping together: what any rank was asked becomes one decision, taken by all ranks at the end of the same step."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rm_scale.distributed import max_over_ranks
from rm_scale.logs import get_logger
from rm_scale.training.attempts import Attempt
from rm_scale.training.preemption import STOP_FILE, StopReason, margin_seconds, reason_now, received_at

logger = get_logger(__name__)


class StopOnRequest(TrainerCallback):
    """End training with a checkpoint when a signal, a STOP file or the clock asks for it.

    The reason is reduced with MAX after every step, so that ranks can't disagree on the step: a checkpoint that some
    ranks write and others don't would wait for ever.

    Args:
        args: of the run; its output directory, rank and number of ranks are used.
        margin: the setting `stop_margin_seconds`; `None`: what was measured decides.
        attempt: where stops are recorded, if at all.

    Attributes:
        reason: what all ranks have agreed to stop for.
        longest_save_seconds: of the saves so far; the trainer sets it after each.
    """

    def __init__(self, args: TrainingArguments, margin: float | None, attempt: Attempt | None) -> None:
        self.args = args
        self.asked_margin = margin
        self.attempt = attempt
        self.reason = StopReason.NONE
        self.longest_save_seconds = 0.0
        self._step = 0
        self._step_seconds: deque[float] = deque(maxlen=20)
        self._step_began = 0.0
        self._is_first = True

    def agree(self) -> StopReason:
        """Return what all ranks stop for, `NONE` to go on. A collective."""
        if self.args.process_index == 0:
            longest_step = max(self._step_seconds, default=0.0)
            margin = margin_seconds(self.asked_margin, self.longest_save_seconds, longest_step)
            mine = reason_now(Path(self.args.output_dir), margin)
        else:
            mine = reason_now(Path("/nonexistent"), 0.0, {})  # file and clock are looked at by rank 0 alone
        reason, rank = max_over_ranks([int(mine), self.args.process_index if mine else -1])
        self.reason = StopReason(reason)
        if self.reason:
            self._announce(rank)
        return self.reason

    def _announce(self, rank: int) -> None:
        """Log and record why the run stops; only signals are sent to one rank."""
        where = f" on rank {rank}" if self.reason >= StopReason.SIGUSR1 else ""
        logger.warning(f"asked to stop ({self.reason.text}{where}): all ranks stop at step {self._step}")
        if self.attempt is not None:
            self.attempt.note("signal", self._step, reason=self.reason.text, received_at=received_at())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._step_began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agree, and let transformers save and stop. No evaluation: the time is short."""
        self._step = state.global_step
        self._step_seconds.append(time.monotonic() - self._step_began)
        if self.attempt is not None:
            if self._is_first:
                self.attempt.note("first_step", self._step)
            self.attempt.step = self._step
        self._is_first = False
        if self.agree():
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False

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
