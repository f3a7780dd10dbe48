"""Where a run's time goes: the seconds of each step and of waiting in it, of loading the model, and peaks of memory.

Rank 0 writes `run/steps.jsonl`, a line per step, and `run/timing.json`. It is always on, since it costs little:
`benchmarks/metering.py` measures how much.
"""

from __future__ import annotations

import contextlib
import ctypes
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
from rm_scale.training.records import RecordFile, WholeRecord


class CollectiveClock:
    """A clock of the seconds in which this rank waited for other ranks.

    A collective that blocks the host does so in `Work.wait`, whoever calls it, so that is what is timed. It can't be
    done with NCCL (`wait` returns at once, and the GPU waits), DDP (it waits in C++) and MPI: these get no figure.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._restore: Callable[[], None] | None = None

    def start(self, uses_ddp: bool) -> bool:
        """Begin to time `Work.wait` where that is possible; return whether `seconds` means anything."""
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
        """Undo what `start` has changed in torch."""
        if self._restore is not None:
            self._restore()
            self._restore = None


class Moment:
    """A point in time on the host, and on a GPU in its queue of work. To make one waits for nothing.

    Attributes:
        host: seconds of `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.host = time.perf_counter()
        self._event: Any = None
        if torch.cuda.is_available():
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def since(self, earlier: Moment) -> float:
        """Return the seconds of the device's work between two moments, after the GPU has reached the later one."""
        if self._event is None or earlier._event is None:
            return self.host - earlier.host
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1e3


class StepTimes(TrainerCallback):
    """Time each step from the request for its data to the end of its optimizer step.

    The trainer calls `begin` at a step's start and `data_read` when its data is there. Evaluation and saving come
    after a step's end and count for no step.

    Args:
        folder: the run's `run/`.
        uses_ddp: gradients are reduced by DDP rather than by DeepSpeed.

    Attributes:
        load: figures of loading the model (`load_record`), written with the others.
        waits: of each step on rank 0, the seconds of waiting for its data and for other ranks (`None`: not known).
    """

    def __init__(self, folder: Path, uses_ddp: bool) -> None:
        self._steps, self._timing = RecordFile(folder / "steps.jsonl"), WholeRecord(folder / "timing.json")
        self.records = (self._steps, self._timing)
        self.uses_ddp = uses_ddp
        self.load: dict[str, Any] = {}
        self.collectives = CollectiveClock()
        self.energy = EnergyMeter()
        self._knows_collectives = False
        self.waits: list[tuple[float, float | None]] = []
        self._began: Moment | None = None
        self._data_seconds = self._waited_before = 0.0
        self._joules_before: float | None = None
        self._unwritten: tuple[Moment, Moment, dict[str, Any]] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of collectives, and write how long the process took to get here."""
        self._knows_collectives = self.collectives.start(self.uses_ddp)
        forget_peaks()
        peaks = gather_from_ranks(self.load.get("load_peak_memory_bytes", 0))
        if state.is_world_process_zero:
            started = psutil.Process().create_time()
            self.load |= {"load_peak_memory_bytes": max(peaks), "seconds_to_training": time.time() - started}
            self._write(self.load)

    def begin(self) -> None:
        """Start timing a step."""
        self._began = Moment()
        self._waited_before = self.collectives.seconds
        self._joules_before = self.energy.joules()

    def data_read(self) -> None:
        """Note that the step's micro-batches have been read."""
        assert self._began is not None
        self._data_seconds = time.perf_counter() - self._began.host

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the step's figures. With a GPU its line is written a step later: by then the GPU has reached its end."""
        if not state.is_world_process_zero or self._began is None:
            return
        self.write_last_step()
        waited = self.collectives.seconds - self._waited_before
        self.waits.append((self._data_seconds, waited if self._knows_collectives else None))
        joules = self.energy.joules()
        record = {
            "step": state.global_step,
            "seconds": None,
            "data_wait_seconds": round(self._data_seconds, 6),
            "communication_seconds": round(waited, 6) if self._knows_collectives else None,
            "energy_joules": joules - self._joules_before
            if joules is not None and self._joules_before is not None
            else None,
        }
        self._unwritten = (self._began, Moment(), record)
        if not torch.cuda.is_available():
            self.write_last_step()

    def write_last_step(self) -> None:
        """Append the last step's line, unless that is done."""
        if self._unwritten is None:
            return
        began, ended, record = self._unwritten
        self._unwritten = None
        self._steps.append({**record, "seconds": round(ended.since(began), 6)})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the highest memory peaks of all ranks."""
        self.write_last_step()
        self.collectives.stop()
        ranks = gather_from_ranks(memory_peaks())
        if state.is_world_process_zero:
            highest = {
                name: max((rank[name] for rank in ranks if rank[name] is not None), default=None) for name in ranks[0]
            }
            energy = {"energy": self.energy.source, "energy_scope": self.energy.scope}
            self._write({**self.load, "peak_memory": highest, **energy})

    def _write(self, record: dict[str, Any]) -> None:
        self._timing.write(json.dumps(record, indent=2) + "\n")


def load_record(seconds: float) -> dict[str, Any]:
    """Return the seconds and peak memory of loading the model on this rank; call it right after the loading."""
    peaks = memory_peaks()
    return {"load_seconds": seconds, "load_peak_memory_bytes": peaks["allocated_bytes"] or peaks["host_bytes"]}


def forget_peaks() -> None:
    """Reset the peaks of GPU and host memory, so that they tell of training and not of loading the model.

    Where the kernel doesn't let a process reset its host peak, that of the loading remains.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


class _HeapFigures(ctypes.Structure):
    """glibc's `struct mallinfo2`: bytes, and numbers of pieces."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def memory_at_rest() -> dict[str, int | None]:
    """Return what this rank holds between two steps, when no activations are alive.

    `in_use_bytes`: of tensors on the GPU; on a processor of all that the C heap has handed out. `free_blocks_bytes`: on
    a processor, what its heap keeps of freed blocks. `None` where that is not known: another C library than glibc.
    """
    if torch.cuda.is_available():
        return {"in_use_bytes": int(torch.cuda.memory_allocated()), "free_blocks_bytes": None}
    try:
        read = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        return {"in_use_bytes": None, "free_blocks_bytes": None}
    read.restype = _HeapFigures
    heap = read()
    return {"in_use_bytes": heap.uordblks + heap.hblkhd, "free_blocks_bytes": heap.fordblks}


def memory_peaks() -> dict[str, int | None]:
    """Return the most bytes this rank held: allocated and reserved on its GPU, if any, and resident on the host."""
    has_gpu = torch.cuda.is_available()
    return {
        "allocated_bytes": int(torch.cuda.max_memory_allocated()) if has_gpu else None,
        "reserved_bytes": int(torch.cuda.max_memory_reserved()) if has_gpu else None,
        "host_bytes": resident_peak_bytes(),
    }
