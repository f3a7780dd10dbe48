"""GPU energy through NVML: a library of the same functions, compiled here, stands in for the driver's."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rm_scale.training import energy
from rm_scale.training.energy import EnergyMeter, gpu_counter

# As in nvml.h: every function gives a code, 0 for success; energies are millijoules in an unsigned long long.
NVML = """
#include <string.h>
typedef struct Device { int kind; } Device;
static Device gpu = {0}, instance = {1}, divided = {2};
static int started = 0, reads = 0, breaks_at = 1000;
extern "C" {
int nvmlInit_v2(void) { started = 1; return INIT; }
const char *nvmlErrorString(int code) { return code == 6 ? "Not Found" : code == 3 ? "Not Supported" : "GPU is lost"; }
int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
  if (!started) return 1;
  if (!strcmp(uuid, "GPU-00000000-aaaa")) *device = &gpu;
  else if (!strcmp(uuid, "MIG-11111111-bbbb")) *device = &instance;
  else if (!strcmp(uuid, "GPU-22222222-cccc")) *device = &divided;
  else return 6;
  return 0;
}
int nvmlDeviceGetMigMode(Device *device, unsigned *current, unsigned *pending) {
  if (device->kind == 0) return 3;
  *current = *pending = 1;
  return 0;
}
#ifndef WITHOUT_COUNTER
int nvmlDeviceGetTotalEnergyConsumption(Device *device, unsigned long long *total) {
  if (device->kind) return 3;
  if (++reads > breaks_at) return 15;
  *total = 5000000000ULL + 2500ULL * reads;
  return 0;
}
#endif
void break_after(int calls) { breaks_at = calls; }
}
"""


def library(folder: Path, name: str, *defines: str) -> Path:
    """NVML's stand-in, compiled."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert compiler is not None, "the tests need a C++ compiler (CONTRIBUTING.md)"
    source, built = folder / f"{name}.cpp", folder / f"lib{name}.so"
    source.write_text(NVML)
    macros = [f"-D{define}" for define in defines] or ["-DINIT=0"]
    subprocess.run([compiler, "-shared", "-fPIC", *macros, "-o", str(built), str(source)], check=True)
    return built


@pytest.mark.parametrize("uuid", ["00000000-aaaa", "GPU-00000000-aaaa"])
def test_joules_are_the_drivers_millijoules(uuid: str, tmp_path: Path) -> None:
    read, source = gpu_counter(uuid, library(tmp_path, "nvml"))
    assert source == "this rank's GPU, by its driver" and read is not None
    first, second = read(), read()
    assert first > 5e6, "more than 32 bits hold"
    assert second - first == 2.5


@pytest.mark.parametrize("uuid", ["11111111-bbbb", "MIG-11111111-bbbb", "22222222-cccc"])
def test_an_instance_of_a_gpu_has_no_counter(uuid: str, tmp_path: Path) -> None:
    read, source = gpu_counter(uuid, library(tmp_path, "nvml"))
    assert read is None and source.endswith("a MIG instance has no energy counter of its own")


def test_why_there_is_none(tmp_path: Path) -> None:
    cases = {
        "OSError": gpu_counter("00000000-aaaa", tmp_path / "libnone.so"),
        "nvmlInit_v2 gave 9": gpu_counter("00000000-aaaa", library(tmp_path, "unloaded", "INIT=9")),
        "nvmlDeviceGetHandleByUUID gave 6 (Not Found)": gpu_counter("33333333", library(tmp_path, "nvml")),
        "undefined symbol: nvmlDeviceGetTotalEnergyConsumption": gpu_counter(
            "00000000-aaaa", library(tmp_path, "old", "INIT=0", "WITHOUT_COUNTER")
        ),
    }
    for reason, (read, source) in cases.items():
        assert read is None and source.startswith("not read: ") and reason in source, source


def test_a_meter_reads_the_ranks_own_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = library(tmp_path, "nvml")
    uuids = {0: "99999999", 1: "00000000-aaaa"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=uuids[number]))
    monkeypatch.setattr(energy, "gpu_counter", lambda uuid: gpu_counter(uuid, built))
    meter = EnergyMeter()
    before, after = meter.joules(), meter.joules()
    assert before is not None and after is not None and after - before == 2.5 and meter.scope == "rank"
    ctypes.CDLL(str(built)).break_after(0)
    assert meter.joules() is None and "GetTotalEnergyConsumption gave 15 (GPU is lost)" in meter.source
    assert meter.joules() is None, "and it is not asked again"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace())
    assert "AttributeError" in EnergyMeter().source
