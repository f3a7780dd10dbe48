"""What a run shows of its progress: a bar on a terminal, and in a log file one line per logged step."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rm_scale.logs import get_logger
from rm_scale.texts import duration

logger = get_logger(__name__)

_SHOWN = (
    ("loss", "loss {:.4f}"),
    ("accuracy", "accuracy {:.3f}"),
    ("margin", "margin {:.3f}"),
    ("learning_rate", "lr {:.3g}"),
    ("grad_norm", "grad norm {:.3g}"),
    ("pairs_per_second", "{:,.1f} pairs/s"),
)


class Progress(TrainerCallback):
    """Show step, loss, accuracy, margin, learning rate, gradient norm, pairs/s and time left, on the main rank.

    It stands for transformers' own bar and printer, which print every logged number. All of them are in
    `run/metrics.jsonl`.

    Args:
        bar: draw a bar where standard error is a terminal.
    """

    def __init__(self, bar: bool = True) -> None:
        self._wants_bar = bar and sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._first_step = 0
        self._began = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count, from the step that a resumed run goes on at."""
        self._first_step, self._began = state.global_step, time.monotonic()
        if self._wants_bar and state.is_world_process_zero:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, unit="step")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show a logged step of training, or the accuracy of an evaluation."""
        if not state.is_world_process_zero or not logs:
            return
        if "loss" in logs:
            numbers = describe(logs)
            if self._bar is not None:
                self._bar.set_postfix_str(numbers)
            else:
                logger.info(f"{state.global_step:,} of {state.max_steps:,} steps: {numbers}{self._time_left(state)}")
        elif "eval_accuracy" in logs:
            logger.info(f"evaluation: accuracy {logs['eval_accuracy']:.4f}, loss {logs['eval_loss']:.4f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _time_left(self, state: TrainerState) -> str:
        done, left = state.global_step - self._first_step, state.max_steps - state.global_step
        if done <= 0 or left <= 0:
            return ""
        return f", {duration((time.monotonic() - self._began) / done * left)} left"


def describe(logs: dict[str, Any]) -> str:
    """Return the numbers of a logged step that are shown, those that it has."""
    shown = [text.format(float(logs[name])) for name, text in _SHOWN if logs.get(name) is not None]
    return ", ".join(shown)
