"""Where a run's time goes: each step's seconds, what of them was waiting, the load before them, the peaks of memory.

Written by the main rank as `run/steps.jsonl`, a line per step, and `run/timing.json`. Cheap enough to be always on
(`benchmarks/metering.py` measures what it costs).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rm_scale.distributed import gather_from_ranks
from rm_scale.training.energy import EnergyMeter
from rm_scale.training.meters import resident_peak_bytes


class CollectiveClock:
    """Seconds in which this rank stood still for other ranks.

    A collective that blocks the host does so in `Work.wait`, whoever calls it. Three kinds of runs can't be timed that
    way, and get no figure: NCCL (its wait returns at once and the GPU waits), DDP (it waits in C++), and MPI.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._restore: Callable[[], None] | None = None

    def start(self, uses_ddp: bool) -> bool:
        """Listen, where there is something to hear; gives whether the figure means anything."""
        if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
            return True
        if uses_ddp or torch.distributed.get_backend() != "gloo":
            return False
        from torch._C._distributed_c10d import Work

        plain: Any = Work.wait

        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return plain(work, *args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - started

        def restore() -> None:
            Work.wait = plain  # type: ignore[method-assign]

        Work.wait = wait  # type: ignore[assignment, method-assign]
        self._restore = restore
        return True

    def stop(self) -> None:
        """Leave torch as it was."""
        if self._restore is not None:
            self._restore()
            self._restore = None


class StepTimes(TrainerCallback):
    """Times each step from the request for its data to the end of its optimizer step.

    The trainer says when a step begins (`begin`) and when its data has been read (`data_read`); evaluation and saving
    come after a step's end and belong to none.

    Args:
        folder: the run's `run/`.
        uses_ddp: gradients are reduced by DDP rather than by DeepSpeed.

    Attributes:
        load: what is known of the time before training, written with the rest.
    """

    def __init__(self, folder: Path, uses_ddp: bool) -> None:
        self.folder = folder
        self.uses_ddp = uses_ddp
        self.load: dict[str, Any] = {}
        self.collectives = CollectiveClock()
        self.energy = EnergyMeter()
        self._knows_collectives = False
        self._began = self._data_seconds = self._waited_before = 0.0
        self._joules_before: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to listen, and note how long it took to get here."""
        self._knows_collectives = self.collectives.start(self.uses_ddp)
        forget_peaks()
        peaks = gather_from_ranks(self.load.get("load_peak_memory_bytes", 0))
        if state.is_world_process_zero:
            started = psutil.Process().create_time()
            self.load |= {"load_peak_memory_bytes": max(peaks), "seconds_to_training": time.time() - started}
            self._write(self.load)

    def begin(self) -> None:
        """A step begins."""
        self._began = time.perf_counter()
        self._waited_before = self.collectives.seconds
        self._joules_before = self.energy.joules()

    def data_read(self) -> None:
        """Its micro-batches are there."""
        self._data_seconds = time.perf_counter() - self._began

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the step's line."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels run on behind the host; what is left of them belongs to this step
        if not state.is_world_process_zero:
            return
        waited = self.collectives.seconds - self._waited_before
        joules = self.energy.joules()
        record = {
            "step": state.global_step,
            "seconds": round(time.perf_counter() - self._began, 6),
            "data_wait_seconds": round(self._data_seconds, 6),
            "communication_seconds": round(waited, 6) if self._knows_collectives else None,
            "energy_joules": joules - self._joules_before
            if joules is not None and self._joules_before is not None
            else None,
        }
        with (self.folder / "steps.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the peaks of all ranks."""
        self.collectives.stop()
        ranks = gather_from_ranks(memory_peaks())
        if state.is_world_process_zero:
            highest = {
                name: max((rank[name] for rank in ranks if rank[name] is not None), default=None) for name in ranks[0]
            }
            energy = {"energy": self.energy.source, "energy_scope": self.energy.scope}
            self._write({**self.load, "peak_memory": highest, **energy})

    def _write(self, record: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "timing.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_record(seconds: float) -> dict[str, Any]:
    """What loading the model took on this rank; called when it has just been loaded."""
    peaks = memory_peaks()
    return {"load_seconds": seconds, "load_peak_memory_bytes": peaks["allocated_bytes"] or peaks["host_bytes"]}


def forget_peaks() -> None:
    """Count peaks anew: what loading took, mapped weight files included, is on record by then.

    Where the kernel doesn't let a process do that, the peak of the load stays in.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory_peaks() -> dict[str, int | None]:
    """Most bytes this rank held: allocated and reserved on its GPU (`None` without one), and resident on the host."""
    has_gpu = torch.cuda.is_available()
    return {
        "allocated_bytes": int(torch.cuda.max_memory_allocated()) if has_gpu else None,
        "reserved_bytes": int(torch.cuda.max_memory_reserved()) if has_gpu else None,
        "host_bytes": resident_peak_bytes(),
    }
