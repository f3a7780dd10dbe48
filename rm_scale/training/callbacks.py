"""Callbacks that watch a run: the metrics file, the step number of log lines, and early warnings."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rm_scale.logs import get_logger, set_log_step
from rm_scale.training.records import RecordFile

logger = get_logger(__name__)


class MetricsFile(TrainerCallback):
    """Append every logged step to `run/metrics.jsonl`, one JSON object per line.

    Attributes:
        details: what the next line has beside the logs: tables and lists, which loggers such as TensorBoard don't take.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.details: dict[str, Any] = {}
        self._file = RecordFile(path)
        self.records = (self._file,)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line on the main rank; NaN and infinity, which JSON lacks, become strings."""
        if not state.is_world_process_zero or not logs:
            return
        record = {"step": state.global_step, **{key: _jsonable(value) for key, value in logs.items()}}
        self._file.append({**record, **self.details})
        self.details = {}


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
        """Set the step that begins as the one that log lines belong to."""
        set_log_step(state.global_step + 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let later lines belong to no step."""
        set_log_step(None)


class EarlyWarnings(TrainerCallback):
    """Say by name when a run looks wrong, once each.

    - `rewards_equal`: all responses of a logging interval got the same reward.
    - `accuracy_stuck`: training accuracy can't be told from 0.5 over the last `window` pairs.

    A non-finite loss or gradient stops the run (see `rm_scale.training.nonfinite_steps`).

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


def outlast_disk_errors(callbacks: Iterable[Any], kinds: Iterable[type]) -> None:
    """Let the libraries that log elsewhere, TensorBoard for one, end no run when the disk or the network refuses.

    Said once when it begins, and once when it works again. What was to be logged meanwhile is lost there;
    `run/metrics.jsonl` has it all. An error before the first step still ends the run.

    Args:
        callbacks: of a trainer; their methods are replaced.
        kinds: the classes of those that belong to such libraries.
    """
    for callback in callbacks:
        if isinstance(callback, tuple(kinds)):
            for event in ("on_log", "on_evaluate", "on_save", "on_step_end", "on_epoch_end", "on_train_end"):
                setattr(callback, event, _outlasting(callback, getattr(callback, event)))


def _outlasting(callback: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    name = type(callback).__name__

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            answer = plain(*args, **kwargs)
        except OSError as error:
            if not getattr(callback, "_rm_scale_fails", False):
                callback._rm_scale_fails = True
                logger.warning(f"{name}: can't write ({error}); the run goes on, and what it should log is lost there")
            if hasattr(callback, "tb_writer"):
                callback.tb_writer = None  # its thread has ended with the error; the next call makes another writer
            return None
        if plain.__name__ == "on_log" and getattr(callback, "_rm_scale_fails", False):
            callback._rm_scale_fails = False
            logger.warning(f"{name}: can write again")
        return answer

    return call
