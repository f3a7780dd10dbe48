"""Measure energy in joules: of a GPU by NVIDIA's driver, of processors by RAPL, where these can be read."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rm_scale.texts import typed_line

POWERCAP = Path("/sys/class/powercap")
NVML = "libnvidia-ml.so.1"
"""NVIDIA's management library, which comes with the driver."""

Counter = tuple[Callable[[], float] | None, str]


class EnergyMeter:
    """Count the joules of what this rank computes on.

    Attributes:
        source: what is measured, or why nothing is, in words.
        scope: whose energy it is: "rank" (this rank's GPU alone) or "node" (all processors of the machine).
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        has_gpu = torch.cuda.is_available()
        self.scope = "rank" if has_gpu else "node"
        self._read, self.source = _current_gpu_counter() if has_gpu else _processor_counter(powercap)

    def joules(self) -> float | None:
        """Return the joules since some moment in the past: differences count. `None`: they can't be read (any more)."""
        if self._read is None:
            return None
        try:
            return self._read()
        except Exception as error:  # whatever a driver raises: no run ends for lack of this figure
            self._read, self.source = None, f"not read to the end: {typed_line(error)}"
            return None


# --- GPUs ------------------------------------------------------------------------------------------------------------


class _NvmlError(Exception):
    """A call of NVML that returned another code than success."""


def _current_gpu_counter() -> Counter:
    """Return a reader of the GPU that this rank computes on, `None` where it has none; and the source in words."""
    try:
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    except Exception as error:  # a torch built for AMD's cards, say
        return None, f"not read: {typed_line(error)}"
    return gpu_counter(uuid)


def gpu_counter(uuid: str, library: str | Path = NVML) -> Counter:
    """Return a reader of one GPU's joules, `None` where it has none; and the source in words.

    Never raises.

    Args:
        uuid: of the GPU or MIG instance, as torch gives it ("8-4-4-4-12" hexadecimal digits) or as the driver does
            (with "GPU-" or "MIG-" before it).
        library: NVML's file.
    """
    try:
        nvml = ctypes.CDLL(str(library))
        _call(nvml, "nvmlInit_v2")  # may be called by every user of the library; the end of the process undoes it
        device = _device_by_uuid(nvml, uuid)
        _total_millijoules(nvml, device)
    except Exception as error:  # no library, no such function, no counter: each with a text of its own
        return None, f"not read: {typed_line(error)}"
    return lambda: _total_millijoules(nvml, device) / 1e3, "this rank's GPU, by its driver"


def _device_by_uuid(nvml: Any, uuid: str) -> ctypes.c_void_p:
    """Return NVML's handle of a whole GPU.

    torch leaves out the prefix of a uuid that says whether it is a GPU or a MIG instance, so both are tried. An
    instance has no counter of its own, and its GPU's counts what others compute there too.

    Raises:
        _NvmlError: there is no such GPU, or it is a MIG instance.
    """
    digits = uuid.removeprefix("GPU-").removeprefix("MIG-")
    device = ctypes.c_void_p()
    try:
        _call(nvml, "nvmlDeviceGetHandleByUUID", f"GPU-{digits}".encode(), ctypes.byref(device))
    except _NvmlError as error:
        try:
            _call(nvml, "nvmlDeviceGetHandleByUUID", f"MIG-{digits}".encode(), ctypes.byref(device))
        except _NvmlError:
            raise error from None
        raise _NvmlError(_NO_COUNTER) from None
    if _is_partitioned(nvml, device):
        raise _NvmlError(_NO_COUNTER)
    return device


_NO_COUNTER = "a MIG instance has no energy counter of its own"


def _is_partitioned(nvml: Any, device: ctypes.c_void_p) -> bool:
    """Return whether the GPU is divided into MIG instances, so that what runs on it is an instance."""
    current, pending = ctypes.c_uint(), ctypes.c_uint()
    try:
        _call(nvml, "nvmlDeviceGetMigMode", device, ctypes.byref(current), ctypes.byref(pending))
    except (_NvmlError, AttributeError):  # a card, or a driver, that knows no instances
        return False
    return bool(current.value)


def _total_millijoules(nvml: Any, device: ctypes.c_void_p) -> int:
    total = ctypes.c_ulonglong()
    _call(nvml, "nvmlDeviceGetTotalEnergyConsumption", device, ctypes.byref(total))
    return total.value


def _call(nvml: Any, name: str, *arguments: Any) -> None:
    """Call a function of NVML, all of which return 0 for success.

    Raises:
        _NvmlError: it returned another code.
        AttributeError: an older driver's library doesn't have it.
    """
    code = getattr(nvml, name)(*arguments)
    if code:
        describe = nvml.nvmlErrorString
        describe.restype = ctypes.c_char_p
        text = (describe(code) or b"").decode(errors="replace")
        raise _NvmlError(f"{name} gave {code} ({text})")


# --- Processors ------------------------------------------------------------------------------------------------------


def _processor_counter(powercap: Path) -> Counter:
    """Return a reader of all processors of this machine, whoever uses them, or `None`; and the source in words."""
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
