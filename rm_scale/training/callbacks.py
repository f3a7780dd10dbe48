"""What watches a run: the metrics file, log lines that know their step, and early warnings."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rm_scale.errors import TrainingError
from rm_scale.logs import get_logger, set_log_step

logger = get_logger(__name__)


class MetricsFile(TrainerCallback):
    """Append every logged step to `run/metrics.jsonl`, one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line on the main rank; numbers that JSON has no name for become strings."""
        if not state.is_world_process_zero or not logs:
            return
        record = {"step": state.global_step, **{key: _jsonable(value) for key, value in logs.items()}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _jsonable(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class StepInLogs(TrainerCallback):
    """Let every log line carry the optimizer step."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step that begins is the one log lines belong to."""
        set_log_step(state.global_step + 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Later lines belong to no step."""
        set_log_step(None)


class EarlyWarnings(TrainerCallback):
    """Say by name when a run looks wrong, once each.

    - `rewards_equal`: all responses of a logging interval got the same reward.
    - `accuracy_stuck`: training accuracy can't be told from 0.5 over the last `window` pairs.

    A non-finite loss or gradient stops the run (see `not_finite_error`).

    Args:
        window: number of pairs over which accuracy is judged.
    """

    def __init__(self, window: int = 2000) -> None:
        self.window = window
        self.said: set[str] = set()
        self._recent: deque[tuple[float, float]] = deque()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at one logged step."""
        logs = logs or {}
        if "loss" not in logs or not state.is_world_process_zero:
            return
        if logs.get("max_reward") is not None and logs["max_reward"] == logs.get("min_reward"):
            self._warn(
                "rewards_equal",
                f"all rewards are {logs['max_reward']:.6g}: the head or the pooled position is the same for "
                "every text. "
                "Check that responses differ before max_length and that the padding token is not EOS.",
            )
        self._watch_accuracy(logs)

    def _watch_accuracy(self, logs: dict[str, Any]) -> None:
        if logs.get("num_pairs") and logs.get("accuracy") is not None:
            self._recent.append((logs["num_pairs"], logs["accuracy"] * logs["num_pairs"]))
        pairs = sum(count for count, _ in self._recent)
        if pairs < self.window:
            return
        accuracy = sum(correct for _, correct in self._recent) / pairs
        if abs(accuracy - 0.5) < 1.96 * 0.5 / math.sqrt(pairs):
            self._warn(
                "accuracy_stuck",
                f"accuracy over the last {pairs:.0f} training pairs is {accuracy:.3f}, no better than chance. "
                "Check the labels (is chosen the better one?), the format verdict above, and the learning rate.",
            )
        while self._recent and pairs - self._recent[0][0] >= self.window:
            pairs -= self._recent.popleft()[0]

    def _warn(self, name: str, text: str) -> None:
        if name not in self.said:
            self.said.add(name)
            logger.warning(f"[{name}] {text}")


def not_finite_error(
    num_bad_losses: int, grad_norm: Any, step: int, suspects: list[str], num_skipped: int, record: Path
) -> TrainingError:
    """The error that ends a run at a NaN or infinite loss or gradient.

    Args:
        num_bad_losses: ranks whose loss is not finite.
        grad_norm: the step's gradient norm, if known.
        step: optimizer step.
        suspects: the groups of the step whose rewards are not finite, of all ranks.
        num_skipped: such steps that were skipped before.
        record: where all rows of the step are listed.
    """
    named = f"Groups with such rewards: {', '.join(suspects[:8])}. " if suspects else ""
    before = f" ({num_skipped} such steps were skipped before, as max_nonfinite_steps allows)" if num_skipped else ""
    return TrainingError(
        f"step {step}: the loss is not finite on {num_bad_losses} ranks (gradient norm {grad_norm}){before}: the "
        f"weights can't be trusted from here on. {named}Rows of this step: {record}. "
        "Fix: lower learning_rate, check these rows, resume from the last checkpoint, or skip such steps with "
        "--max_nonfinite_steps."
    )
