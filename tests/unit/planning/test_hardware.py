"""One table of devices: a plan and a run's MFU take the same peak for every device, by its driver's names."""

from __future__ import annotations

import pytest

from rm_scale.launch.machine import device_here
from rm_scale.planning.hardware import device_by_driver_name, device_of_run, find_device, known_devices, peak_flops
from rm_scale.training import meters

# Names as torch.cuda.get_device_name and nvidia-smi give them, and the peak of the maker's data sheet in TFLOP/s.
DRIVER_NAMES = [
    ("NVIDIA A100-SXM4-40GB", "a100-40g", 312),
    ("A100-PCIE-40GB", "a100-40g", 312),
    ("NVIDIA A100-SXM4-80GB", "a100-80g", 312),
    ("NVIDIA A100 80GB PCIe", "a100-80g", 312),
    ("NVIDIA A800-SXM4-80GB", "a100-80g", 312),
    ("NVIDIA H100 80GB HBM3", "h100-80g", 989),
    ("NVIDIA H100 PCIe", "h100-pcie", 756),
    ("NVIDIA GH200 480GB", "h100-96g", 989),
    ("NVIDIA H200", "h200", 989),
    ("NVIDIA B200", "b200", 2250),
    ("AMD Instinct MI300X", "mi300x", 1307),
    ("AMD Instinct MI300X OAM", "mi300x", 1307),
    ("NVIDIA L40S", "l40s", 362),
    ("NVIDIA RTX A6000", "a6000", 155),
    ("NVIDIA A40", "a40", 150),
    ("NVIDIA GeForce RTX 4090", "4090", 165),
    ("NVIDIA GeForce RTX 3090", "3090", 71),
]


@pytest.mark.parametrize(("driver_name", "name", "tera_flops"), DRIVER_NAMES)
def test_run_and_plan_take_the_same_peak(
    monkeypatch: pytest.MonkeyPatch, driver_name: str, name: str, tera_flops: float
) -> None:
    """A run's MFU, the plan that a run is compared with, `launch` on this machine and `plan --gpu NAME` agree."""
    monkeypatch.setattr(meters.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(meters.torch.cuda, "get_device_name", lambda: driver_name)
    planned, is_known = device_of_run(driver_name, None)
    assert is_known and planned == find_device(name) == device_here([driver_name], None)
    assert meters.device_peak_flops() == planned.peak_flops == tera_flops * 1e12


def test_every_device_of_the_table_is_tried_above_by_all_its_driver_names() -> None:
    tried = {name for _, name, _ in DRIVER_NAMES}
    assert tried == {device.name for device in known_devices().values() if not device.is_cpu}
    for device in known_devices().values():
        assert all(device_by_driver_name(f"Maker {part} Model") == device for part in device.driver_names)


@pytest.mark.parametrize(
    "driver_name", ["AMD EPYC", "NVIDIA RTX A4000", "NVIDIA GB200", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10"]
)
def test_a_device_that_is_not_in_the_table_has_no_peak(driver_name: str) -> None:
    assert device_by_driver_name(driver_name) is None and peak_flops(driver_name) is None
    assert device_of_run(driver_name, None)[1] is False
