"""Turn measurements into a device for the planner, and write it as a YAML file.

`rm_scale.planning.hardware.read_devices` reads the file.
"""

from __future__ import annotations

import json
import math
import platform
import socket
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rm_scale.errors import UserError
from rm_scale.files import write_whole
from rm_scale.hardware_bench.measured import Layers, Measured
from rm_scale.logs import get_logger
from rm_scale.planning.hardware import Device, device_by_driver_name, known_devices
from rm_scale.planning.scenario import RowLoad, Scenario
from rm_scale.planning.shape import shape_from_config
from rm_scale.planning.step_time import compute_parts
from rm_scale.version import __version__

logger = get_logger(__name__)


def check_output(path: Path) -> None:
    """Refuse to write over what is not an earlier measurement.

    Raises:
        UserError: something else lies there, or there is no such folder.
    """
    import yaml

    if not path.parent.is_dir():
        raise UserError(f"output={path}: there is no folder {path.parent}. Fix: make it, or give another path.")
    if not path.exists():
        return
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict) or "measured" not in content:
        raise UserError(f"output={path}: exists, and is no earlier measurement. Fix: give another --output.")
    logger.info(f"{path}: an earlier measurement, will be replaced")


def like_device(measured: Measured) -> Device:
    """Return the built-in device that supplies the figures not measured here, such as the network between nodes.

    A GPU that no built-in device is named after gets the one with the nearest matrix product rate.
    """
    devices = known_devices()
    if measured.device == "cpu":
        return devices["cpu"]
    known = device_by_driver_name(measured.device_name)
    if known is not None:
        return known
    gpus = [device for device in devices.values() if not device.is_cpu]
    return min(gpus, key=lambda device: abs(math.log(device.matmul_flops / measured.best.flops)))


def device_name(measured: Measured, asked: str | None) -> str:
    """Return the device's name; that of a processor begins with "cpu-", which the planner recognises."""
    name = (asked or f"{like_device(measured).name}-{socket.gethostname()}").strip().lower().replace(" ", "-")
    if measured.device == "cpu" and name != "cpu" and not name.startswith("cpu-"):
        name = f"cpu-{name}"
    return name


def device_entry(measured: Measured) -> dict[str, Any]:
    """Return the measured fields of a planner's device, as its YAML file has them."""
    like = like_device(measured)
    known = measured.device != "cpu" and device_by_driver_name(measured.device_name) is not None
    entry: dict[str, Any] = {
        "like": like.name,
        "title": measured.device_name,
        "matmul_flops": _round(measured.best.flops),
        "memory_bandwidth": _round(max(measured.memory_bandwidth.values())),
        "memory_bytes": int(measured.memory_bytes),
        "devices_per_node": measured.num_ranks,
    }
    if measured.device == "cpu":
        # Processors differ too much in their instruction sets for the built-in shares to hold.
        shares = step_shares(measured, entry)
        entry["step_efficiency"], entry["elementwise_share"] = (_round(share) for share in shares)
    if not known:
        # There is no data sheet to take the peak from: the best measured rate stands in.
        entry["peak_flops"] = entry["matmul_flops"]
    link = measured.link_bandwidth()
    if link is not None:
        entry["link_bandwidth"] = _round(link)
        entry["collective_seconds"] = _round(measured.collective_seconds() or 0.0)
    entry["sources"] = (
        f"measured by rm-scale bench hardware with {measured.num_ranks} ranks at once, {measured.dtype}, torch "
        f"{measured.versions['torch']}; the rest as {like.name}"
    )
    return entry


def step_shares(measured: Measured, entry: dict[str, Any]) -> tuple[float, float]:
    """Return which share of the matrix product rate, and of the memory rate, whole layers reach.

    The planner's time of a layer is the sum of the work at each of the two rates. The narrow and the wide layers have
    them in different proportions, so that their two times determine the two shares. A share that would be above 1 is
    set to 1, and the other is then fitted to the rest.

    Args:
        measured: holds the layers' times.
        entry: the device's `matmul_flops` and `memory_bandwidth`.

    Returns:
        `step_efficiency` and `elementwise_share`.
    """
    device = replace(
        like_device(measured),
        step_efficiency=1.0,
        elementwise_share=1.0,
        **{name: entry[name] for name in ("matmul_flops", "memory_bandwidth")},
    )
    work = [layer_seconds(layers, device) for layers in measured.layers]
    # seconds = rated / step_efficiency + moved / elementwise_share, relative to each time.
    rated = [first / layers.seconds for (first, _), layers in zip(work, measured.layers, strict=True)]
    moved = [second / layers.seconds for (_, second), layers in zip(work, measured.layers, strict=True)]
    determinant = rated[0] * moved[1] - rated[1] * moved[0]
    if determinant:
        by_rate, by_memory = (moved[1] - moved[0]) / determinant, (rated[0] - rated[1]) / determinant
        if by_rate >= 1 and by_memory >= 1:
            return 1 / by_rate, 1 / by_memory
        if by_memory < 1:
            return 1 / max(1.0, _explained_by(rated, [1 - part for part in moved])), 1.0
    return 1.0, 1 / max(1.0, _explained_by(moved, [1 - part for part in rated]))


def _explained_by(parts: Sequence[float], rests: Sequence[float]) -> float:
    """Return the factor by which `parts` come nearest to `rests` (least squares)."""
    return sum(part * rest for part, rest in zip(parts, rests, strict=True)) / sum(part * part for part in parts)


def layer_seconds(layers: Layers, device: Device) -> tuple[float, float]:
    """Return the planner's seconds for these layers: in products and attention, and in moving memory."""
    heads = {"num_attention_heads": layers.num_heads, "num_key_value_heads": layers.num_heads}
    sizes = {"hidden_size": layers.hidden_size, "intermediate_size": layers.intermediate_size, "vocab_size": 8}
    shape = shape_from_config({"model_type": "llama", "num_hidden_layers": layers.num_layers, **sizes, **heads})
    tokens, squared = layers.rows * layers.tokens, layers.rows * layers.tokens**2
    scenario = Scenario(
        shape=shape,
        device=device,
        num_devices=1,
        load=RowLoad(tokens, squared, tokens, squared, layers.rows / 2, layers.rows),
        zero_stage=None,
        checkpointing=False,
    )
    parts = compute_parts(scenario)
    return parts["products"] + parts["attention"], parts["elementwise"] + parts["weights"]


def _round(value: float) -> float:
    """Round to four digits: the others change from one measurement to the next."""
    return float(f"{value:.4g}")


def write_device(path: Path, name: str, measured: Measured) -> None:
    """Write a YAML file with the device for the planner and everything that was measured.

    Raises:
        UserError: it can't be written.
    """
    import yaml

    links = {name: asdict(link) for name, link in measured.links().items()}
    figures = json.loads(json.dumps(asdict(measured)))  # tuples become lists, which YAML knows
    date = datetime.now(UTC).isoformat(timespec="seconds")
    content = {
        "devices": {name: device_entry(measured)},
        "measured": {"date": date, "rm_scale": __version__, "host": socket.gethostname(), "links": links}
        | {"platform": platform.platform(), **figures},
    }
    try:
        write_whole(path, yaml.safe_dump(content, sort_keys=False))
    except OSError as error:
        raise UserError(f"output={path}: can't be written ({error.strerror}). Fix: give another --output.") from error
