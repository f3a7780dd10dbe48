"""Compare the memory and time that a run took with the plan's prediction: logged, recorded, warned about."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
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
from rm_scale.training.step_timing import StepTimes, memory_at_rest

logger = get_logger(__name__)

TOLERANCE = 0.20
"""A larger relative deviation is a warning."""

LEAST_BYTES = 500_000_000
"""A smaller deviation of memory is none: what the libraries take differs so much from machine to machine."""

WARM_UP_STEPS = 1
"""Steps that don't count: kernels are compiled and memory is taken in them."""

FIRST_STEPS = 5
"""After so many steps a run says for the first time what differs from its plan; what still does is said at its end."""

_STATES = ("weights", "optimizer", "offload_buffers")
_PASSING = ("activations", "gathered_weights", "communication_buffers", "optimizer_step", "held_blocks")
_WORDS = {
    "activations": "activations",
    "gathered_weights": "gathered weights",
    "communication_buffers": "communication buffers",
    "optimizer_step": "the optimizer's temporaries",
    "held_blocks": "freed blocks that the heap keeps",
}


@dataclass(frozen=True)
class Term:
    """A part of a prediction that is also measured by itself.

    Attributes:
        name: what it is, in words.
        predicted, measured: bytes, or seconds.
    """

    name: str
    predicted: float
    measured: float

    @property
    def difference(self) -> float:
        """What was measured beyond the prediction; negative where it was less."""
        return self.measured - self.predicted


class PlanCheck(TrainerCallback):
    """Compare peak memory and step time with the plan's, after the first steps and at the end of training.

    Args:
        predicted: the plan's estimate for this run.
        path: the file that prediction and measurement are written to.
        knows_speed: the device's rates are known, so that its predicted time means something.

    Attributes:
        step_times: the run's clock of waiting, where there is one.
        at_rest: what this rank held before the second step, by `memory_at_rest`.
    """

    def __init__(self, predicted: Estimate, path: Path, knows_speed: bool) -> None:
        self.predicted = predicted
        self._file = WholeRecord(path)
        self.records = (self._file,)
        self.knows_speed = knows_speed
        self.peak = 0
        self.seconds: list[float] = []
        self.at_rest: dict[str, int | None] = {}
        self.step_times: StepTimes | None = None
        self._said: set[str] = set()
        self._compared = False
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
        """Start the clock; before the second step look at what lasts, when optimizer states are there."""
        if len(self.seconds) == WARM_UP_STEPS and not self.at_rest:
            self.at_rest = memory_at_rest()
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
        """Take the peak over all ranks from the logged metrics; compare as soon as the first steps are done."""
        self.peak = max(self.peak, int((logs or {}).get("peak_memory_bytes", 0)))
        if len(self.seconds) >= FIRST_STEPS and not self._compared:
            self._compare(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare, on rank 0."""
        record = self._compare(state)
        if record is not None:
            logger.info(_summary(record))

    def _compare(self, state: TrainerState) -> dict[str, Any] | None:
        """Record both sides on rank 0, and warn once of each figure that is off; `None` where nothing was measured."""
        if not state.is_world_process_zero or not self.peak:
            return None
        self._compared = True
        waits = self.step_times.waits[WARM_UP_STEPS:] if self.step_times is not None else []
        # The heap grows with every longer row; no activations are alive now either.
        at_rest = self.at_rest and {**self.at_rest, "free_blocks_bytes": memory_at_rest()["free_blocks_bytes"]}
        measured = Measured(self.peak, self.seconds[WARM_UP_STEPS:], at_rest, waits)
        record = comparison(self.predicted, measured, self.knows_speed)
        self._file.write(json.dumps(record, indent=2) + "\n")
        for figure, warning in warnings_of(self.predicted, measured, self.knows_speed).items():
            if figure not in self._said:
                logger.warning(f"[plan] {warning}")
            self._said.add(figure)
        return record


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


@dataclass(frozen=True)
class Measured:
    """What a run's steps took.

    Attributes:
        peak: most bytes of a rank.
        seconds: of each step that counts, without reading its data.
        at_rest: bytes between two steps, by `memory_at_rest`; empty where nobody looked.
        waits: of each step that counts, the seconds of waiting for its data and for other ranks (`None`: not known).
    """

    peak: int
    seconds: list[float] = field(default_factory=list)
    at_rest: dict[str, int | None] = field(default_factory=dict)
    waits: list[tuple[float, float | None]] = field(default_factory=list)


def comparison(predicted: Estimate, measured: Measured, knows_speed: bool) -> dict[str, Any]:
    """Return predicted and measured figures, and a warning for each that differs by more than the limits above.

    A warning names the term that was off most, of those that are measured by themselves: they stand in `terms`.

    Args:
        predicted: the plan's estimate.
        measured: what the run took.
        knows_speed: compare time too.
    """
    return {
        "predicted": predicted_record(predicted, knows_speed),
        "measured": {
            "peak_memory_bytes": measured.peak,
            "step_seconds": median(measured.seconds) if measured.seconds else None,
            "data_wait_seconds": median(data for data, _ in measured.waits) if measured.waits else None,
        },
        "terms": {
            "memory_bytes": [asdict(term) for term in memory_terms(predicted, measured)],
            "step_seconds": [asdict(term) for term in time_terms(predicted, measured)] if knows_speed else [],
        },
        "warnings": list(warnings_of(predicted, measured, knows_speed).values()),
    }


def warnings_of(predicted: Estimate, measured: Measured, knows_speed: bool) -> dict[str, str]:
    """Return what is off by too much, in words, by figure: memory, time or data."""
    found = {
        "memory": _memory_warning(predicted, measured, memory_terms(predicted, measured)),
        "time": _time_warning(predicted, measured, time_terms(predicted, measured)) if knows_speed else None,
        "data": _data_warning(measured),
    }
    return {figure: warning for figure, warning in found.items() if warning is not None}


def memory_terms(predicted: Estimate, measured: Measured) -> list[Term]:
    """Return the parts of the peak that can be told apart, largest difference first; none without a look at rest.

    What lasts is there between two steps; what comes and goes is the rest of the peak. On a processor that rest is told
    from the process itself (libraries, and what the heap did not hand out): freed blocks are in the heap's own figures.
    """
    lasting = measured.at_rest.get("in_use_bytes")
    if lasting is None:
        return []
    parts, scenario = predicted.memory, predicted.scenario
    # ZeRO-3 keeps its buffer of gradients; others are made anew in each step.
    stays = (*_STATES, "gradients") if scenario.zero_stage == 3 else _STATES
    passes = _PASSING if scenario.zero_stage == 3 else (*_PASSING, "gradients")
    states = sum(parts.get(name, 0) for name in stays)
    working = sum(parts.get(name, 0) for name in passes)
    word = f"what steps need beside them, most of it {_largest(parts)}"
    terms = [Term("model states (weights and optimizer)", states, lasting)]
    free = measured.at_rest.get("free_blocks_bytes")
    if free is None:
        terms.append(Term(word, working, measured.peak - lasting))
    else:
        terms.append(Term(word, working, free))
        process = parts.get("framework", 0)
        terms.append(Term("the process with its libraries", process, max(0, measured.peak - lasting - free)))
    return sorted(terms, key=lambda term: abs(term.difference), reverse=True)


def time_terms(predicted: Estimate, measured: Measured) -> list[Term]:
    """Return the parts of a step's seconds that can be told apart; none where waiting for other ranks is not known."""
    waited = [seconds for _, seconds in measured.waits if seconds is not None]
    if not waited or not measured.seconds:
        return []
    time_of, others = predicted.time, median(waited)
    communication = time_of.num_micro_steps * time_of.communication + time_of.step_communication
    computing = time_of.num_micro_steps * time_of.compute + time_of.update
    # Communication that hides behind computing is not waited for: all that is predicted is the most.
    expected = min(max(others, 0.0), communication)
    return [
        Term("computing and the update", computing, max(0.0, median(measured.seconds) - others)),
        Term("communication", expected, others),
    ]


def _memory_warning(predicted: Estimate, measured: Measured, terms: list[Term]) -> str | None:
    deviation = measured.peak / predicted.peak_memory_bytes - 1
    difference = measured.peak - predicted.peak_memory_bytes
    if abs(deviation) <= TOLERANCE or abs(difference) <= LEAST_BYTES:
        return None
    text = (
        f"peak memory was {measured.peak / 1e9:.2f} GB, {_more_or_less(deviation)} than the "
        f"{predicted.peak_memory_bytes / 1e9:.2f} GB predicted; "
    )
    term = _blamed(terms, difference)
    if term is None:
        return f"{text}the part of the prediction most likely wrong: {_largest(predicted.memory)}"
    return (
        f"{text}most of it is {term.name}: {term.measured / 1e9:.2f} GB measured, {term.predicted / 1e9:.2f} predicted"
    )


def _blamed(terms: list[Term], difference: float) -> Term | None:
    """Return the term that is off most in the direction in which the whole is; `None` where no term is."""
    signed = [term for term in terms if term.difference * difference > 0]
    return max(signed, key=lambda term: abs(term.difference), default=None)


def _largest(parts: dict[str, int]) -> str:
    """Return the largest part of the prediction that is an estimate, with its size."""
    name = max(_WORDS, key=lambda part: parts.get(part, 0))
    return f"{_WORDS[name]} ({parts.get(name, 0) / 1e9:.2f} GB)"


def _data_warning(measured: Measured) -> str | None:
    """Say that steps wait for their data, which a plan takes to be read ahead."""
    if not measured.waits or not measured.seconds:
        return None
    waited, seconds = median(data for data, _ in measured.waits), median(measured.seconds)
    if waited <= TOLERANCE * seconds:
        return None
    return f"a step waited {waited:.3g} s for its data, beside {seconds:.3g} s of work; the plan predicts no such wait"


def _more_or_less(deviation: float) -> str:
    return f"{abs(deviation):.0%} {'more' if deviation > 0 else 'less'}"


def _time_warning(predicted: Estimate, measured: Measured, terms: list[Term]) -> str | None:
    if not measured.seconds:
        return None
    low, high, seconds = predicted.time.low, predicted.time.high, median(measured.seconds)
    nearest = min(max(seconds, low), high)
    deviation = seconds / nearest - 1
    if abs(deviation) <= TOLERANCE:
        return None
    term = _blamed(terms, seconds - nearest)
    named = predicted.time.bound_by == "communication" if term is None else term.name == "communication"
    figure = "node_bandwidth" if named else "step_efficiency or matmul_flops"
    seen = "" if term is None else f"{term.name} took {term.measured:.3g} s, predicted {term.predicted:.3g}; "
    return (
        f"a step took {seconds:.3g} s, {_more_or_less(deviation)} than the {low:.3g} to {high:.3g} s predicted; {seen}"
        f"most likely wrong: {figure} of {predicted.scenario.device.name} "
        "(rm-scale bench hardware measures this machine)"
    )


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
