"""What `observed_train.py` adds to a training: counts of the calls that block the host, then a profile of kernels."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from transformers import TrainerCallback

from rm_scale.files import write_whole
from rm_scale.texts import one_line

REPOSITORY = Path(__file__).resolve().parents[2]
BLOCKING = "called a synchronizing CUDA operation"
"""torch's text, in `c10/cuda/CUDAFunctions.cpp`."""

_TOP_KERNELS = 25
_TOP_PLACES = 20


def place_of_call(frame: Any) -> str:
    """Name the innermost line outside torch that a call came from: of ours, or of which library."""
    while frame is not None:
        file = frame.f_code.co_filename.replace(os.sep, "/")
        if (
            "/torch/" not in file
            and not file.startswith("<")
            and not file.endswith(("warnings.py", "step_observer.py"))
        ):
            return f"{short_name(file)}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "unknown"


def short_name(file: str) -> str:
    """Return a file's name below its package's folder."""
    _, found, rest = file.rpartition("/site-packages/")
    if found:
        return rest
    root = str(REPOSITORY).replace(os.sep, "/") + "/"
    return file.removeprefix(root) if file.startswith(root) else file.rpartition("/")[2]


class BlockingCalls:
    """Counts the warnings of torch's sync debug mode, by step and by the line that they came from."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.steps: list[int] = []
        self.places: Counter[str] = Counter()
        self._now = 0
        self._plain: Any = None

    def begin(self) -> None:
        """Count from here on."""
        self._plain = warnings.showwarning
        warnings.showwarning = self._seen
        warnings.simplefilter("always")
        self._mode("warn")

    def next_step(self) -> None:
        """Note that a step has ended."""
        if self.device == "cpu":  # a processor never blocks; one call stands in for those of a card
            warnings.warn(BLOCKING, UserWarning, stacklevel=2)
        warnings.simplefilter("always")  # libraries set filters of their own
        self.steps.append(self._now)
        self._now = 0

    def end(self) -> None:
        """Count no longer."""
        self._mode("default")
        warnings.showwarning = self._plain

    def _mode(self, mode: str) -> None:
        if self.device != "cpu":
            torch.cuda.set_sync_debug_mode(mode)

    def _seen(self, message: Any, category: Any, filename: str, lineno: int, *more: Any, **named: Any) -> None:
        if BLOCKING not in str(message):
            self._plain(message, category, filename, lineno, *more, **named)
            return
        self._now += 1
        self.places[place_of_call(sys._getframe(1))] += 1

    def figures(self, num_forwards: int) -> dict[str, Any]:
        """Return the counts as the record has them."""
        ours = sum(count for place, count in self.places.items() if place.startswith("rm_scale/"))
        return {
            "per_step": self.steps,
            "micro_steps": num_forwards,
            "of_rm_scale": ours,
            "places": [{"calls": count, "from": place} for place, count in self.places.most_common(_TOP_PLACES)],
        }


def kernel_rows(events: Any, on_cuda: bool) -> list[dict[str, Any]]:
    """List the kernels that took longest; on a processor the operators."""
    kind, name = (DeviceType.CUDA, "self_device_time_total") if on_cuda else (DeviceType.CPU, "self_cpu_time_total")
    found = [event for event in events if event.device_type == kind and not event.is_user_annotation]
    total = sum(getattr(event, name) for event in found) or 1.0
    found.sort(key=lambda event: -getattr(event, name))
    return [
        {
            "kernel": event.key[:90],
            "calls": event.count,
            "ms": round(getattr(event, name) / 1e3, 3),
            "share": round(getattr(event, name) / total, 4),
        }
        for event in found[:_TOP_KERNELS]
    ]


def busy_seconds(events: Any, on_cuda: bool) -> float:
    """Add up all kernels' times; above the wall clock where streams overlap."""
    kind, name = (DeviceType.CUDA, "self_device_time_total") if on_cuda else (DeviceType.CPU, "self_cpu_time_total")
    own = [event for event in events if event.device_type == kind and not event.is_user_annotation]
    return sum(float(getattr(event, name)) for event in own) / 1e6


class StepObserver(TrainerCallback):
    """Counts blocking calls, then profiles, then ends the process.

    Args:
        trainer: its model's forward passes are the micro-steps.
        job: what `observed_train.py` was asked for.
        is_main: this rank writes the answer.
    """

    def __init__(self, trainer: Any, job: dict[str, Any], is_main: bool) -> None:
        self.job, self.is_main = job, is_main
        self.on_cuda = job["device"] != "cpu"
        self.calls = BlockingCalls(job["device"])
        self.forwards = Counter[str]()
        trainer.model.register_forward_pre_hook(lambda *_: self.forwards.update(["now"]))
        self.profile: Any = None
        self.began = 0.0
        self.found: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Count from the end of the warm-up, profile from the end of the counting."""
        step, first = state.global_step, self.job["warmup"]
        last = first + self.job["counted"]
        if first < step <= last:
            self.calls.next_step()
        if step == first:
            self.forwards.clear()
            self.calls.begin()
        elif step == last:
            self.calls.end()
            self.found = {"blocking": self.calls.figures(self.forwards["now"])}
            self._write()
            self._begin_profile()
        elif step == last + self.job["profiled"]:
            self._end_profile()
            sys.stdout.flush()
            os._exit(0)

    def _write(self) -> None:
        if self.is_main:
            write_whole(self.job["answer"], json.dumps(self.found))

    def _begin_profile(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if self.on_cuda else []
        try:
            self.profile = torch.profiler.profile(activities=activities)
            self.profile.start()
        except RuntimeError as error:  # some virtual machines have no counters
            self.profile = None
            self.found["profile"] = {"error": one_line(error, 300)}
        self.began = time.perf_counter()

    def _end_profile(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        if self.profile is not None:
            self.profile.stop()
            events = self.profile.key_averages()
            self.found["profile"] = {
                "steps": self.job["profiled"],
                "seconds": round(seconds, 4),
                "kernel_seconds": round(busy_seconds(events, self.on_cuda), 4),
                "kernels": kernel_rows(events, self.on_cuda),
            }
        self._write()
