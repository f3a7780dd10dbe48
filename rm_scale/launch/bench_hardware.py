"""`rm-scale bench hardware`: measure the machine at hand, in the figures that the planner knows devices by.

All ranks measure at once, since that is how a run uses the machine: processors share their cores and memory, GPUs their
power and links. The file that is written can be read by `rm_scale.planning.hardware.read_devices`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rm_scale
from rm_scale.errors import UserError
from rm_scale.launch.ranks import num_local_ranks, start_ranks
from rm_scale.logs import get_logger
from rm_scale.planning.hardware import GIB, Device, known_devices
from rm_scale.planning.scenario import RowLoad, Scenario
from rm_scale.planning.shape import shape_from_config
from rm_scale.planning.timing import compute_parts

logger = get_logger(__name__)

_START_SECONDS = 300
"""Importing torch on a slow disk, and making the process group, before anything is measured."""
MIB = 2**20


@dataclass(frozen=True)
class Product:
    """One shape of matrix product: `(tokens, inputs) x (inputs, outputs)`.

    Attributes:
        what: which layer has it.
        tokens, inputs, outputs: the shape.
        flops: rate of one rank while all ranks work, FLOP/s; the slowest rank's median.
    """

    what: str
    tokens: int
    inputs: int
    outputs: int
    flops: float


@dataclass(frozen=True)
class Layers:
    """Decoder layers of a Llama, forward and backward with all gradients.

    Attributes:
        rows, tokens: sequences at once, and the length of each.
        hidden_size, intermediate_size, num_heads, num_layers: the shape.
        seconds: the slowest rank's median while all ranks work.
    """

    rows: int
    tokens: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_layers: int
    seconds: float


@dataclass(frozen=True)
class Transfer:
    """One collective at one size.

    Attributes:
        collective: all_reduce, all_gather or reduce_scatter.
        num_bytes: of the whole tensor.
        link_bytes: that a ring sends over each rank's link: 2 (n - 1) / n of it for all-reduce, half that for others.
        seconds: the slowest rank's median.
    """

    collective: str
    num_bytes: int
    link_bytes: float
    seconds: float


@dataclass(frozen=True)
class Link:
    """Time of a collective as latency + link_bytes / bandwidth.

    Attributes:
        latency_seconds: of an empty one.
        bandwidth: bytes/s over each rank's link.
    """

    latency_seconds: float
    bandwidth: float


@dataclass(frozen=True)
class Measured:
    """What the ranks found.

    Attributes:
        device: cpu or cuda.
        device_name: the processor's or GPU's.
        dtype: of the matrix products.
        num_ranks: that worked at once.
        num_threads: of each rank, on a CPU.
        memory_bytes: that one process can have.
        products: by shape.
        layers: whole decoder layers, narrow and wide ones.
        memory_bandwidth: bytes/s of one rank, by kind: copy (1 read, 1 write) and triad (2 reads, 1 write).
        backend: gloo or nccl; empty for one rank.
        transfers: collectives by size.
        versions: of torch, CUDA, NCCL, Python.
    """

    device: str
    device_name: str
    dtype: str
    num_ranks: int
    num_threads: int
    memory_bytes: float
    products: tuple[Product, ...]
    layers: tuple[Layers, Layers]
    memory_bandwidth: dict[str, float]
    backend: str
    transfers: tuple[Transfer, ...]
    versions: dict[str, str]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measured:
        """The inverse of `asdict`."""
        products = tuple(Product(**item) for item in values["products"])
        transfers = tuple(Transfer(**item) for item in values["transfers"])
        narrow, wide = (Layers(**item) for item in values["layers"])
        return cls(**{**values, "products": products, "layers": (narrow, wide), "transfers": transfers})

    @property
    def best(self) -> Product:
        """The fastest product."""
        return max(self.products, key=lambda product: product.flops)

    @property
    def typical(self) -> Product:
        """The product of a 7B model's MLP, or what is nearest to it of those that were measured."""
        return next((item for item in self.products if item.what == TYPICAL), self.products[-1])

    def links(self) -> dict[str, Link]:
        """The fitted link by collective; those measured at two sizes or more."""
        by_name: dict[str, list[Transfer]] = {}
        for transfer in self.transfers:
            by_name.setdefault(transfer.collective, []).append(transfer)
        return {name: fit_link(items) for name, items in by_name.items() if len(items) > 1}

    def link_bandwidth(self) -> float | None:
        """Bytes/s: the middle one of the three collectives; `None` when none could be fitted."""
        rates = sorted(link.bandwidth for link in self.links().values())
        return rates[len(rates) // 2] if rates else None

    def collective_seconds(self) -> float | None:
        """Start of a collective: the middle one of the three; `None` when none could be fitted."""
        starts = sorted(link.latency_seconds for link in self.links().values())
        return starts[len(starts) // 2] if starts else None


TYPICAL = "MLP of a 7B model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rm-scale bench hardware`."""
    parser.add_argument("--output", default="hardware.yaml", help="YAML file to write (default: hardware.yaml)")
    parser.add_argument("--name", help="what to call the device (default: by its kind and this machine's name)")
    parser.add_argument("--nproc", type=int, help="ranks that measure at once (default: one per GPU, or two)")
    parser.add_argument("--seconds", type=float, default=20.0, help="time to measure for, starting left out")


def run(options: argparse.Namespace) -> int:
    """Measure, print a table and write the file; gives 0.

    Raises:
        UserError: an option makes no sense, the file can't be written, or the ranks failed.
    """
    if not 1 <= options.seconds <= 3600:
        raise UserError(f"seconds={options.seconds:g}: must be from 1 to 3600. Fix: leave it out, or 20.")
    output = Path(options.output)
    check_output(output)
    num_ranks = num_local_ranks(options.nproc, default_on_cpu=2)
    measured = measure(num_ranks, options.seconds)
    name = device_name(measured, options.name)
    write_device(output, name, measured)
    print(as_table(name, measured))
    print(f"\nwritten to {output}. Plan with it: rm-scale plan ... --gpu {name} --hardware {output}")
    return 0


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


def measure(num_ranks: int, seconds: float) -> Measured:
    """Start the ranks and read what they found.

    Raises:
        UserError: they failed, or did not end.
    """
    logger.info(f"measuring with {num_ranks} ranks at once for about {seconds:.0f} s, besides starting them")
    with tempfile.TemporaryDirectory(prefix="rm_scale_bench_") as folder:
        answer = Path(folder) / "measured.json"
        job = json.dumps({"answer": str(answer), "seconds": seconds})
        ended = start_ranks("rm_scale.launch.bench_worker", [job], num_ranks, _START_SECONDS + 5 * seconds)
        if ended.code != 0 or not answer.is_file():
            how = "did not end" if ended.code is None else f"ended with code {ended.code}"
            raise UserError(f"the ranks {how}; they printed: {ended.tail()}. Fix: rm-scale doctor --nproc {num_ranks}.")
        return Measured.from_dict(json.loads(answer.read_text(encoding="utf-8")))


def fit_link(transfers: Sequence[Transfer]) -> Link:
    """Latency and bandwidth that fit the times best, each time weighted by its own size (least relative squares).

    Args:
        transfers: of one collective, at two sizes or more.
    """
    # Minimise sum of ((latency + bytes * inverse - seconds) / seconds)^2; its two normal equations.
    weights = [1 / item.seconds**2 for item in transfers]
    total = sum(weights)
    mean_bytes = sum(w * item.link_bytes for w, item in zip(weights, transfers, strict=True)) / total
    mean_seconds = sum(w * item.seconds for w, item in zip(weights, transfers, strict=True)) / total
    spread = sum(w * (item.link_bytes - mean_bytes) ** 2 for w, item in zip(weights, transfers, strict=True))
    joint = sum(
        w * (item.link_bytes - mean_bytes) * (item.seconds - mean_seconds)
        for w, item in zip(weights, transfers, strict=True)
    )
    inverse = joint / spread
    latency = mean_seconds - inverse * mean_bytes
    if latency < 0 or inverse <= 0:
        # Noise, or caches that make small transfers relatively slow or fast: then the largest one alone says it.
        largest = max(transfers, key=lambda item: item.link_bytes)
        return Link(0.0, largest.link_bytes / largest.seconds)
    return Link(latency, 1 / inverse)


# --- The file --------------------------------------------------------------------------------------------------------

# Words in a GPU's name, most telling first.
_GPU_WORDS = (
    (("h200",), "h200"),
    (("b200",), "b200"),
    (("h100",), "h100-80g"),
    (("a100", "40gb"), "a100-40g"),
    (("a100",), "a100-80g"),
    (("a800",), "a100-80g"),
    (("mi300x",), "mi300x"),
    (("l40s",), "l40s"),
    (("a6000",), "a6000"),
    (("a40",), "a40"),
    (("4090",), "4090"),
    (("3090",), "3090"),
)


def like_device(measured: Measured) -> Device:
    """The known device whose other figures stand in for what can't be measured here, such as the network of a node."""
    devices = known_devices()
    if measured.device == "cpu":
        return devices["cpu"]
    words = measured.device_name.lower()
    for needed, name in _GPU_WORDS:
        if all(word in words for word in needed):
            return devices[name]
    gpus = [device for device in devices.values() if not device.is_cpu]
    return min(gpus, key=lambda device: abs(math.log(device.matmul_flops / measured.best.flops)))


def device_name(measured: Measured, asked: str | None) -> str:
    """What the device is called; processors must begin with "cpu-", by which the planner knows them."""
    name = (asked or f"{like_device(measured).name}-{socket.gethostname()}").strip().lower().replace(" ", "-")
    if measured.device == "cpu" and name != "cpu" and not name.startswith("cpu-"):
        name = f"cpu-{name}"
    return name


def device_entry(measured: Measured) -> dict[str, Any]:
    """The fields of a planner's device that were measured."""
    like = like_device(measured)
    known = measured.device != "cpu" and _is_named(measured)
    entry: dict[str, Any] = {
        "like": like.name,
        "title": measured.device_name,
        "matmul_flops": _round(measured.best.flops),
        "memory_bandwidth": _round(max(measured.memory_bandwidth.values())),
        "memory_bytes": int(measured.memory_bytes),
        "devices_per_node": measured.num_ranks,
    }
    if measured.device == "cpu":
        # Their instruction sets differ too much for one figure of all.
        shares = step_shares(measured, entry)
        entry["step_efficiency"], entry["elementwise_share"] = (_round(share) for share in shares)
    if not known:
        # No data sheet at hand: the best rate seen.
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
    """What a step makes of the products' rate and of the memory's, by the narrow and the wide layers' times.

    The planner's time of layers is a sum of work at either rate. Two shapes, in which the two weigh differently, give
    both shares; one that would come out above 1 is 1, and the other then explains the rest.

    Args:
        measured: holds the layers.
        entry: rates of the device, as far as they are known.

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
    """The factor of `parts` that comes nearest to `rests` (least squares)."""
    return sum(part * rest for part, rest in zip(parts, rests, strict=True)) / sum(part * part for part in parts)


def layer_seconds(layers: Layers, device: Device) -> tuple[float, float]:
    """The planner's seconds of these layers: in products and attention, and in moving memory."""
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


def _is_named(measured: Measured) -> bool:
    words = measured.device_name.lower()
    return any(all(word in words for word in needed) for needed, _ in _GPU_WORDS)


def _round(value: float) -> float:
    """Four digits: more would not come out again."""
    return float(f"{value:.4g}")


def write_device(path: Path, name: str, measured: Measured) -> None:
    """Write the YAML file: the device for the planner, and everything that was measured.

    Raises:
        UserError: it can't be written.
    """
    import yaml

    links = {name: asdict(link) for name, link in measured.links().items()}
    figures = json.loads(json.dumps(asdict(measured)))  # tuples become lists, which YAML knows
    date = datetime.now(UTC).isoformat(timespec="seconds")
    content = {
        "devices": {name: device_entry(measured)},
        "measured": {"date": date, "rm_scale": rm_scale.__version__, "host": socket.gethostname(), "links": links}
        | {"platform": platform.platform(), **figures},
    }
    try:
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise UserError(f"output={path}: can't be written ({error.strerror}). Fix: give another --output.") from error


# --- The table -------------------------------------------------------------------------------------------------------


def as_table(name: str, measured: Measured) -> str:
    """What was measured, for people."""
    each = f"{measured.num_threads} threads each" if measured.device == "cpu" else "one GPU each"
    lines = [f"{name}: {measured.device_name}; ranks at once: {measured.num_ranks}, {each}; figures are per rank", ""]
    lines += [f"matrix products, {measured.dtype}"]
    lines += [_product_line(product, measured) for product in measured.products]
    lines += ["", "decoder layers, forward and backward"]
    lines += [_layers_line(layers) for layers in measured.layers]
    lines += ["", "memory"]
    lines += [f"  {kind:<20} {rate / 1e9:10.1f} GB/s" for kind, rate in measured.memory_bandwidth.items()]
    lines += [f"  {'available':<20} {measured.memory_bytes / GIB:10.1f} GiB"]
    if measured.transfers:
        lines += ["", f"collectives over {measured.num_ranks} ranks, {measured.backend}"]
        lines += [_transfer_line(transfer) for transfer in measured.transfers]
        lines += [
            f"  {collective:<16} fits {link.latency_seconds * 1e6:8.0f} us + bytes / {link.bandwidth / 1e9:.2f} GB/s"
            for collective, link in measured.links().items()
        ]
    else:
        lines += ["", "collectives: one rank has nobody to talk to; --nproc 2 measures them"]
    return "\n".join(lines)


def _product_line(product: Product, measured: Measured) -> str:
    shape = f"{product.tokens} x {product.inputs} x {product.outputs}"
    notes = [
        note for note, other in (("largest rate", measured.best), ("typical", measured.typical)) if product == other
    ]
    note = f"  <- {', '.join(notes)}" if notes else ""
    return f"  {product.what:<20} {shape:>20} {product.flops / 1e12:9.3f} TFLOP/s{note}"


def _layers_line(layers: Layers) -> str:
    shape = f"{layers.num_layers} x {layers.hidden_size}, {layers.rows * layers.tokens} tokens"
    return f"  {shape:<20} {layers.seconds * 1e3:18.1f} ms"


def _transfer_line(transfer: Transfer) -> str:
    rate = transfer.link_bytes / transfer.seconds / 1e9
    size = f"{transfer.num_bytes / MIB:.0f} MiB"
    return f"  {transfer.collective:<16} {size:>8} {transfer.seconds * 1e3:10.2f} ms {rate:9.2f} GB/s a link"
