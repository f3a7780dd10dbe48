"""Energy drawn so far, where the machine lets one read it: NVIDIA's driver for GPUs, RAPL for processors."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """A counter of joules.

    Attributes:
        source: what is counted, or why nothing is.
        scope: whose joules they are: "rank" (its GPU alone) or "node" (all of a machine's processors).
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        has_gpu = torch.cuda.is_available()
        self.scope = "rank" if has_gpu else "node"
        self._read, self.source = _gpu_counter() if has_gpu else _processor_counter(powercap)

    def joules(self) -> float | None:
        """Since some moment in the past; differences count. `None` where nothing can be read, or no longer."""
        if self._read is None:
            return None
        try:
            return self._read()
        except Exception as error:  # a driver's own errors; a run doesn't end for a figure
            self._read, self.source = None, f"not read to the end: {type(error).__name__}"
            return None


Counter = tuple[Callable[[], float] | None, str]


def _gpu_counter() -> Counter:
    """This rank's GPU."""
    try:
        pynvml: Any = importlib.import_module("pynvml")
        pynvml.nvmlInit()
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception as error:  # no library, no driver, an old card: each with an error of its own
        return None, f"not read: {type(error).__name__} (pip install nvidia-ml-py; cards since Volta count energy)"
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, "this rank's GPU, by its driver"


def _processor_counter(powercap: Path) -> Counter:
    """All processors of this machine, whoever uses them."""
    files = sorted(powercap.glob("intel-rapl:[0-9]*/energy_uj")) if powercap.is_dir() else []
    files = [file for file in files if file.parent.name.count(":") == 1 and os.access(file, os.R_OK)]
    if not files:
        return None, f"not read: no readable energy_uj below {powercap} (a virtual machine, or only root may read it)"
    try:
        wraps = [_number(file.with_name("max_energy_range_uj")) for file in files]
        last = [_number(file) for file in files]
    except (OSError, ValueError) as error:
        return None, f"not read: {type(error).__name__} below {powercap}"
    total = [0.0] * len(files)

    def read() -> float:
        for place, file in enumerate(files):
            now = _number(file)
            total[place] += now - last[place] + (wraps[place] if now < last[place] else 0.0)
            last[place] = now
        return sum(total) / 1e6

    return read, "all processors of this machine, by RAPL"


def _number(file: Path) -> float:
    return float(file.read_text(encoding="utf-8"))
