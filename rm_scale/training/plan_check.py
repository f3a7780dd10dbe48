"""Compare the memory and time that a run took with the plan's prediction: logged, recorded, warned about."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rm_scale.errors import TrainingError
from rm_scale.logs import get_logger
from rm_scale.modeling.out_of_memory import is_out_of_memory
from rm_scale.planning.estimate import Estimate
from rm_scale.texts import one_line
from rm_scale.training.records import WholeRecord

logger = get_logger(__name__)

TOLERANCE = 0.20
"""A larger relative deviation is a warning."""

LEAST_BYTES = 500_000_000
"""A smaller deviation of memory is none: what the libraries take differs so much from machine to machine."""

WARM_UP_STEPS = 1
"""Steps that don't count: kernels are compiled and memory is taken in them."""

_UNCERTAIN = {
    "activations": "activations",
    "gathered_weights": "gathered weights",
    "communication_buffers": "communication buffers",
    "optimizer_step": "the optimizer's temporaries",
    "framework": "what the libraries take",
}
"""The parts of a prediction that are estimates, in words."""


class PlanCheck(TrainerCallback):
    """Compare peak memory and step time with the plan's, at the end of training.

    Args:
        predicted: the plan's estimate for this run.
        path: the file that prediction and measurement are written to.
        knows_speed: the device's rates are known, so that its predicted time means something.
    """

    def __init__(self, predicted: Estimate, path: Path, knows_speed: bool) -> None:
        self.predicted = predicted
        self._file = WholeRecord(path)
        self.records = (self._file,)
        self.knows_speed = knows_speed
        self.peak = 0
        self.seconds: list[float] = []
        self._started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write what was predicted, so that it is there when the run doesn't reach its end."""
        if state.is_world_process_zero:
            predicted = predicted_record(self.predicted, self.knows_speed)
            record: dict[str, Any] = {"predicted": predicted, "measured": None, "warnings": []}
            self._file.write(json.dumps(record, indent=2) + "\n")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note a step's time."""
        self.seconds.append(time.perf_counter() - self._started)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the peak over all ranks from the logged metrics."""
        self.peak = max(self.peak, int((logs or {}).get("peak_memory_bytes", 0)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare, on rank 0."""
        if not state.is_world_process_zero or not self.peak:
            return
        record = comparison(self.predicted, self.peak, self.seconds[WARM_UP_STEPS:], self.knows_speed)
        self._file.write(json.dumps(record, indent=2) + "\n")
        logger.info(_summary(record))
        for warning in record["warnings"]:
            logger.warning(f"[plan] {warning}")


def predicted_memory(trainer: Any) -> Estimate | None:
    """Return the plan's estimate for a trainer's run, `None` when the trainer has no `PlanCheck`."""
    checks = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, PlanCheck)]
    return checks[0].predicted if checks else None


@contextlib.contextmanager
def out_of_memory_explained(predicted: Estimate | None) -> Iterator[None]:
    """Turn a failed allocation into one that says what the plan expected and what to change.

    Raises:
        TrainingError: memory ran out in the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(out_of_memory_text(str(error), predicted)) from error


def out_of_memory_text(seen: str, predicted: Estimate | None) -> str:
    """Return a message with what was predicted, by part, what happened, and which settings need less memory."""
    text = f"out of memory: {one_line(seen, 160)}. "
    if predicted is not None:
        parts = sorted(predicted.memory.items(), key=lambda part: part[1], reverse=True)[:3]
        largest = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts)
        text += f"The plan predicted a peak of {predicted.peak_memory_bytes / 1e9:.2f} GB per rank ({largest}). "
    return (
        f"{text}Fix: a smaller max_tokens_per_device (padded rows: per_device_train_batch_size), a shorter max_length, "
        "gradient_checkpointing: true, a higher ZeRO stage or offload, LoRA or QLoRA; rm-scale plan compares them, and "
        "rm-scale launch --auto_batch tries. The last checkpoint can be resumed with any of the first three."
    )


def predicted_record(predicted: Estimate, knows_speed: bool) -> dict[str, Any]:
    """Return the plan's figures as they are written to `plan_check.json`."""
    return {
        "peak_memory_bytes": predicted.peak_memory_bytes,
        "memory": predicted.memory,
        "step_seconds": {"low": predicted.time.low, "high": predicted.time.high} if knows_speed else None,
    }


def comparison(predicted: Estimate, peak: int, seconds: list[float], knows_speed: bool) -> dict[str, Any]:
    """Return predicted and measured figures, and a warning for each that differs by more than the limits above.

    Args:
        predicted: the plan's estimate.
        peak: measured peak memory of a rank, bytes.
        seconds: measured time of each step that counts.
        knows_speed: compare time too.
    """
    record: dict[str, Any] = {
        "predicted": predicted_record(predicted, knows_speed),
        "measured": {"peak_memory_bytes": peak, "step_seconds": median(seconds) if seconds else None},
        "warnings": [],
    }
    deviation = peak / predicted.peak_memory_bytes - 1
    if abs(deviation) > TOLERANCE and abs(peak - predicted.peak_memory_bytes) > LEAST_BYTES:
        record["warnings"].append(
            f"peak memory was {peak / 1e9:.2f} GB, {_more_or_less(deviation)} than the "
            f"{predicted.peak_memory_bytes / 1e9:.2f} GB predicted; the part of the prediction most likely wrong: "
            f"{_uncertain_part(predicted)}"
        )
    if knows_speed and seconds:
        record["warnings"] += _time_warnings(predicted, median(seconds))
    return record


def _uncertain_part(predicted: Estimate) -> str:
    """Return the largest part of the prediction that is an estimate, with its size."""
    parts = {name: predicted.memory.get(name, 0) for name in _UNCERTAIN}
    name = max(parts, key=lambda part: parts[part])
    return f"{_UNCERTAIN[name]} ({parts[name] / 1e9:.2f} GB)"


def _more_or_less(deviation: float) -> str:
    return f"{abs(deviation):.0%} {'more' if deviation > 0 else 'less'}"


def _time_warnings(predicted: Estimate, measured: float) -> list[str]:
    low, high = predicted.time.low, predicted.time.high
    nearest = min(max(measured, low), high)
    deviation = measured / nearest - 1
    if abs(deviation) <= TOLERANCE:
        return []
    device = predicted.scenario.device
    term = "step_efficiency or matmul_flops" if predicted.time.bound_by == "compute" else "node_bandwidth"
    return [
        f"a step took {measured:.3g} s, {_more_or_less(deviation)} than the {low:.3g} to {high:.3g} s predicted; most "
        f"likely wrong: {term} of {device.name} (rm-scale bench hardware measures this machine)"
    ]


def _summary(record: dict[str, Any]) -> str:
    predicted, measured = record["predicted"], record["measured"]
    text = (
        f"plan and run: peak memory {predicted['peak_memory_bytes'] / 1e9:.2f} GB predicted, "
        f"{measured['peak_memory_bytes'] / 1e9:.2f} GB measured"
    )
    if measured["step_seconds"] is None:
        return text
    band = predicted["step_seconds"]
    said = f"{band['low']:.3g} to {band['high']:.3g} s predicted" if band else "not predicted for this device"
    return f"{text}; step {said}, {measured['step_seconds']:.3g} s measured"
