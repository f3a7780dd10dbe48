"""Stopping together: what any rank was asked becomes one decision, taken by all ranks at the end of the same step."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rm_scale.distributed import max_over_ranks
from rm_scale.logs import get_logger
from rm_scale.training.lives import Lives
from rm_scale.training.preemption import STOP_FILE, StopReason, margin_seconds, reason_now, received_at

if TYPE_CHECKING:
    from rm_scale.training.trainer import RewardTrainer

logger = get_logger(__name__)


class StopOnRequest(TrainerCallback):
    """End training with a checkpoint when a signal, a STOP file or the clock asks for it.

    The flag is reduced with MAX after every step, so that ranks can't disagree on the step: a checkpoint that some
    ranks write and others don't would wait for ever.

    Args:
        trainer: whose save times count.
        margin: `stop_margin_seconds` as asked.
        lives: where it is written down.
    """

    def __init__(self, trainer: RewardTrainer, margin: float | None, lives: Lives | None) -> None:
        self.trainer = trainer
        self.asked_margin = margin
        self.lives = lives
        self.reason = StopReason.NONE
        self._steps: deque[float] = deque(maxlen=20)
        self._step_began = 0.0
        self._is_first = True

    def agree(self) -> StopReason:
        """What all ranks stop for, if anything. A collective."""
        args = self.trainer.args
        if args.process_index == 0:
            margin = margin_seconds(self.asked_margin, self.trainer.longest_save_seconds, max(self._steps, default=0.0))
            mine = reason_now(Path(args.output_dir), margin)
        else:
            mine = reason_now(Path("/nonexistent"), 0.0, {})
        reason, rank = max_over_ranks([int(mine), args.process_index if mine else -1], args.device)
        self.reason = StopReason(reason)
        if self.reason:
            self._say(rank)
        return self.reason

    def _say(self, rank: int) -> None:
        step = self.trainer.state.global_step
        where = f" on rank {rank}" if self.reason >= StopReason.SIGUSR1 else ""
        logger.warning(f"asked to stop ({self.reason.text}{where}): all ranks stop at step {step}")
        if self.lives is not None:
            self.lives.note("signal", step, reason=self.reason.text, received_at=received_at())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._step_began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Agree, and let transformers save and stop. No evaluation: the time is short."""
        self._steps.append(time.monotonic() - self._step_began)
        if self._is_first and self.lives is not None:
            self.lives.note("first_step", state.global_step)
        self._is_first = False
        if self.lives is not None:
            self.lives.step = state.global_step
        if self.agree():
            control.should_save = True
            control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """An epoch that was left in the middle is not at its end."""
        if self.reason:
            control.should_evaluate = False
            control.should_save = False

    def remove_stop_file(self) -> None:
        """Obeyed once: the next life must not stop for it again."""
        if self.reason is StopReason.STOP_FILE and self.trainer.args.process_index == 0:
            (Path(self.trainer.args.output_dir) / STOP_FILE).unlink(missing_ok=True)
