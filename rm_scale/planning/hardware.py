"""The one table of accelerators: peak and achievable rates, memory, links, and the names that drivers give them.

Plans, `rm-scale launch`, a run's MFU and the benchmarks all read it. A user adds devices in YAML (`read_devices`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rm_scale.errors import ConfigError
from rm_scale.texts import did_you_mean, one_line
from rm_scale.yaml_files import read_yaml

GIB = 2**30
GBIT = 1e9 / 8
"""Bytes per second of one gigabit per second."""


@dataclass(frozen=True)
class Device:
    """One kind of accelerator, in a node as it is usually built.

    Attributes:
        name: what the command line calls it.
        title: what it is called in tables.
        memory_bytes: what a process can allocate at most, context included.
        peak_flops: dense bfloat16 peak by the maker's data sheet, FLOP/s.
        matmul_flops: what large bfloat16 matrix products reach, FLOP/s.
        memory_bandwidth: bytes/s.
        link_bandwidth: bytes/s out of one device to its neighbours in the node, one direction, by the data sheet.
        node_bandwidth: bytes/s out of a whole node: the sum of its network cards, one direction.
        devices_per_node: accelerators in one node.
        step_efficiency: share of `matmul_flops` that the products of a large training step reach; one figure per kind,
            see docs/planning.md.
        elementwise_share: of `memory_bandwidth`, what element-wise kernels reach.
        context_bytes: memory taken before the first tensor: driver context, kernels, communication buffers.
        launch_seconds: the host's time to launch a kernel; layers can't be faster than their kernels' launches.
        collective_seconds: start of a collective, where it takes longer than is usual within a node or across nodes.
        sources: where the figures are from.
        driver_names: parts of the names by which drivers call it (`torch.cuda.get_device_name`, `nvidia-smi`).
    """

    name: str
    title: str
    memory_bytes: float
    peak_flops: float
    matmul_flops: float
    memory_bandwidth: float
    link_bandwidth: float
    node_bandwidth: float
    devices_per_node: int = 8
    step_efficiency: float = 0.8
    elementwise_share: float = 0.8
    context_bytes: float = 1.4e9
    launch_seconds: float = 15e-6
    collective_seconds: float = 0.0
    sources: str = ""
    driver_names: tuple[str, ...] = ()

    @property
    def is_cpu(self) -> bool:
        """Tell whether it is a processor, which has no driver context and no memory apart from the host's."""
        return self.name == "cpu" or self.name.startswith("cpu-")


_MAMF = "achievable: measured large products (ml-engineering, MAMF)"
_ASSUMED = "achievable: assumed 80 % of the peak, not measured"
_GEFORCE = (
    "achievable: bfloat16 products of torch, medians of what owners of such cards published; links through the host's "
    "memory, as two cards without NVLink reached (fsdp_qlora)"
)

# Rates and memory: makers' data sheets (dense, without sparsity). Memory: what the driver shows as total. Where several
# devices' driver names are in a name, the longest counts.
_DEVICES = (
    Device(
        "a100-40g",
        "A100 SXM 40 GB",
        39.4 * GIB,
        312e12,
        271e12,
        1.555e12,
        300e9,
        8 * 200 * GBIT,
        step_efficiency=0.88,
        sources=_MAMF,
        driver_names=("A100",),
    ),
    Device(
        "a100-80g",
        "A100 SXM 80 GB",
        79.1 * GIB,
        312e12,
        271e12,
        2.039e12,
        300e9,
        8 * 200 * GBIT,
        step_efficiency=0.88,
        sources=_MAMF,
        driver_names=("A100-SXM4-80GB", "A100-SXM-80GB", "A100 80GB", "A800"),
    ),
    Device(
        "h100-80g",
        "H100 SXM 80 GB",
        79.1 * GIB,
        989e12,
        794e12,
        3.35e12,
        450e9,
        8 * 400 * GBIT,
        step_efficiency=0.67,
        sources=_MAMF,
        driver_names=("H100",),
    ),
    Device(
        "h100-pcie",
        "H100 PCIe 80 GB",
        79.1 * GIB,
        756e12,
        605e12,
        2.0e12,
        64e9,
        100 * GBIT,
        step_efficiency=0.67,
        sources=f"NVIDIA H100 data sheet (links: PCIe 5, without an NVLink bridge); {_ASSUMED}; else as H100 SXM",
        driver_names=("H100 PCIe",),
    ),
    Device(
        "h100-96g",
        "H100 96 GB HBM2e, 500 W",
        94.0 * GIB,
        989e12,
        732e12,
        2.46e12,
        450e9,
        8 * 400 * GBIT,
        step_efficiency=0.67,
        sources="achievable: 80 % of 912e12, between SXM and NVL as torchtitan says of its cards; else as H100",
        driver_names=("GH200",),  # the GPU beside Grace: an H100 of 96 GB, with faster HBM3
    ),
    Device(
        "h200",
        "H200 SXM 141 GB",
        139.8 * GIB,
        989e12,
        794e12,
        4.8e12,
        450e9,
        8 * 400 * GBIT,
        step_efficiency=0.67,
        sources=f"{_MAMF}, H100",
        driver_names=("H200",),
    ),
    Device(
        "b200",
        "B200 180 GB",
        178.0 * GIB,
        2250e12,
        1745e12,
        8e12,
        900e9,
        8 * 400 * GBIT,
        sources=_MAMF,
        driver_names=("B200",),
    ),
    Device(
        "mi300x",
        "MI300X 192 GB",
        191.0 * GIB,
        1307e12,
        758e12,
        5.3e12,
        448e9,
        8 * 400 * GBIT,
        sources=_MAMF,
        driver_names=("MI300X",),
    ),
    Device(
        "l40s",
        "L40S 48 GB",
        44.4 * GIB,
        362e12,
        290e12,
        0.864e12,
        32e9,
        100 * GBIT,
        sources=_ASSUMED,
        driver_names=("L40S",),
    ),
    Device(
        "a6000",
        "RTX A6000 48 GB",
        47.5 * GIB,
        155e12,
        124e12,
        0.768e12,
        32e9,
        100 * GBIT,
        devices_per_node=4,
        sources=_ASSUMED,
        driver_names=("A6000",),
    ),
    Device(
        "a40",
        "A40 48 GB",
        44.4 * GIB,
        150e12,
        120e12,
        0.696e12,
        32e9,
        100 * GBIT,
        devices_per_node=4,
        sources=_ASSUMED,
        driver_names=("A40",),
    ),
    Device(
        "4090",
        "RTX 4090 24 GB",
        23.6 * GIB,
        165e12,
        163e12,
        1.008e12,
        6e9,
        25 * GBIT,
        devices_per_node=2,
        step_efficiency=0.88,
        sources=_GEFORCE,
        driver_names=("4090",),
    ),
    Device(
        "3090",
        "RTX 3090 24 GB",
        23.6 * GIB,
        71e12,
        76e12,
        0.936e12,
        4.5e9,
        25 * GBIT,
        devices_per_node=2,
        step_efficiency=0.88,
        sources=_GEFORCE,
        driver_names=("3090",),
    ),
    Device(
        "cpu",
        "a processor",
        16 * GIB,
        1.0e12,
        0.5e12,
        20e9,
        2e9,
        10 * GBIT,
        devices_per_node=1,
        context_bytes=0.95e9,
        launch_seconds=0.0,
        step_efficiency=0.65,
        sources="placeholder: run `rm-scale bench hardware`",
    ),
)

_ALIASES = {
    "a100": "a100-80g",
    "a100-80gb": "a100-80g",
    "a100-40gb": "a100-40g",
    "a800": "a100-80g",
    "h100": "h100-80g",
    "h100-80gb": "h100-80g",
    "h100-sxm": "h100-80g",
    "rtx4090": "4090",
    "rtx3090": "3090",
    "rtxa6000": "a6000",
    "h200-141g": "h200",
    "b200-180g": "b200",
}


def known_devices() -> dict[str, Device]:
    """Return all built-in devices by name."""
    return {device.name: device for device in _DEVICES}


def find_device(name: str, file: str | None = None) -> Device:
    """Find a device by the name that the command line takes, in the user's YAML file or the built-in table.

    Args:
        name: such as "h100-80g"; upper case, spaces and underscores don't matter.
        file: YAML file with `devices: {name: {field: value}}`; see `read_devices`.

    Raises:
        ConfigError: neither has it; the text offers the nearest names.
    """
    devices = {**known_devices(), **(read_devices(file) if file else {})}
    plain = name.strip().lower().replace("_", "-").replace(" ", "-")
    found = devices.get(plain) or devices.get(_ALIASES.get(plain, "")) or devices.get(name)
    if found is not None:
        return found
    hint = did_you_mean(plain, [*devices, *_ALIASES], "one of those.", most=3, likeness=0.4, same_number=True)
    raise ConfigError(
        [
            f"gpu={one_line(name, 200)!r}: not a device we know ({', '.join(devices)}). Fix: {hint} For another "
            "one give its figures in a file: --hardware FILE.yaml (docs/planning.md)."
        ]
    )


def device_of_run(driver_name: str | None, file: str | None) -> tuple[Device, bool]:
    """Return the device that a run is compared with, and whether its rates are known.

    A GPU that is not in the table is compared with an A100 of 80 GB, a processor with a placeholder.

    Args:
        driver_name: the GPU's name; `None` on a processor.
        file: YAML file of measured figures, whose first device counts; `None` without one.

    Raises:
        ConfigError: the file can't be used.
    """
    if file is not None:
        return next(iter(read_devices(file).values())), True
    if driver_name is None:
        return known_devices()["cpu"], False
    found = device_by_driver_name(driver_name)
    return (found, True) if found is not None else (known_devices()["a100-80g"], False)


def device_by_driver_name(name: str) -> Device | None:
    """Return the device that a driver calls by this name, or `None` for one that is not in the table.

    Args:
        name: as `torch.cuda.get_device_name` and `nvidia-smi` give it, such as "NVIDIA H100 80GB HBM3".
    """
    if "Laptop" in name:  # these have a desktop card's number, but less memory and lower rates
        return None
    found = [(len(part), device) for device in _DEVICES for part in device.driver_names if _has_word(name, part)]
    return max(found, key=lambda match: match[0])[1] if found else None


def _has_word(name: str, part: str) -> bool:
    """Tell whether `part` stands in `name` between other characters than letters and digits: A40 is not in A4000."""
    return re.search(rf"(?<![A-Za-z0-9]){re.escape(part)}(?![A-Za-z0-9])", name) is not None


def peak_flops(driver_name: str) -> float | None:
    """Return the dense bfloat16 peak in FLOP/s of the device that a driver calls by this name; `None`: not known."""
    device = device_by_driver_name(driver_name)
    return device.peak_flops if device is not None else None


def read_devices(file: str) -> dict[str, Device]:
    """Read the devices that a user describes, by lower-case name.

    A device is a mapping of `Device` fields. `like: NAME` takes what is missing from another device.

    Raises:
        ConfigError: the file can't be read, or a device in it is incomplete or has unknown fields.
    """
    try:
        content = read_yaml(Path(file))
    except ValueError as error:
        raise ConfigError([f"hardware={file}: can't be read ({one_line(error)}). Fix: give a YAML file."]) from error
    entries = content.get("devices") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise ConfigError([f"hardware={file}: has no devices. Fix: write 'devices:' and under it a name with fields."])
    problems: list[str] = []
    devices = {str(name).lower(): _device_from(str(name), entry, file, problems) for name, entry in entries.items()}
    if problems:
        raise ConfigError(problems)
    return {name: device for name, device in devices.items() if device is not None}


def _device_from(name: str, entry: Any, file: str, problems: list[str]) -> Device | None:
    where = f"hardware={file}: {name}"
    if not isinstance(entry, Mapping):
        problems.append(f"{where}: must be a mapping of figures. Fix: write 'peak_flops: 312e12' lines under it.")
        return None
    values = dict(entry)
    like = values.pop("like", None)
    allowed = {item.name: item for item in fields(Device) if item.name not in {"name", "driver_names"}}
    for key in values.keys() - allowed.keys():
        problems.append(f"{where}.{key}: no such figure. Fix: {did_you_mean(str(key), allowed, 'remove it.')}")
    good = {key: value for key, value in values.items() if key in allowed}
    for key in [key for key in good if key not in {"title", "sources"}]:
        good[key] = _positive(good[key], f"{where}.{key}", problems)
    if problems:
        return None
    base = known_devices().get(str(like)) if like is not None else None
    if like is not None and base is None:
        problems.append(f"{where}.like={like!r}: not a device we know. Fix: one of {', '.join(known_devices())}.")
        return None
    if base is not None:
        return replace(base, **{"title": name, "sources": file, **good, "name": name.lower()})
    required = [item.name for item in allowed.values() if item.name in _REQUIRED and item.name not in good]
    if required:
        problems.append(f"{where}: lacks {', '.join(required)}. Fix: add them, or 'like: NAME' of a similar device.")
        return None
    return Device(**{"title": name, "sources": file, **good, "name": name.lower()})


_REQUIRED = {
    "memory_bytes",
    "peak_flops",
    "matmul_flops",
    "memory_bandwidth",
    "link_bandwidth",
    "node_bandwidth",
}


def _positive(value: Any, where: str, problems: list[str]) -> Any:
    """Return the number that a figure is; YAML reads 312e12 as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number < 1e20:
        problems.append(f"{where}={value!r}: must be a number, not negative. Fix: give it in bytes, or per second.")
    return int(number) if where.endswith("devices_per_node") and number == number else number
