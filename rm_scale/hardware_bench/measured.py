"""What a hardware benchmark measures: matrix products, decoder layers, memory, and collectives between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
        link_bytes: what a ring of n ranks sends over each link: 2 (n - 1) / n of `num_bytes` for an all-reduce, half of
            that for the others.
        seconds: the slowest rank's median.
    """

    collective: str
    num_bytes: int
    link_bytes: float
    seconds: float


@dataclass(frozen=True)
class Link:
    """The time of a collective, modelled as latency + link_bytes / bandwidth.

    Attributes:
        latency_seconds: time of a collective without data.
        bandwidth: bytes/s over each rank's link.
    """

    latency_seconds: float
    bandwidth: float


@dataclass(frozen=True)
class Measured:
    """All measurements of one machine.

    Attributes:
        device: cpu or cuda.
        device_name: the processor's or GPU's.
        dtype: of the matrix products.
        num_ranks: ranks that measured at the same time.
        num_threads: of each rank, on a CPU.
        memory_bytes: memory that one process can use.
        products: by shape.
        layers: whole decoder layers, of a narrow and of a wide model.
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
        """Read back what `dataclasses.asdict` wrote."""
        products = tuple(Product(**item) for item in values["products"])
        transfers = tuple(Transfer(**item) for item in values["transfers"])
        narrow, wide = (Layers(**item) for item in values["layers"])
        return cls(**{**values, "products": products, "layers": (narrow, wide), "transfers": transfers})

    @property
    def best(self) -> Product:
        """The matrix product with the highest rate."""
        return max(self.products, key=lambda product: product.flops)

    @property
    def typical(self) -> Product:
        """The matrix product of a 7B model's MLP; the last one measured where that one was too large."""
        return next((item for item in self.products if item.what == TYPICAL), self.products[-1])

    def links(self) -> dict[str, Link]:
        """Return the fitted link of each collective that was measured at two sizes or more."""
        by_name: dict[str, list[Transfer]] = {}
        for transfer in self.transfers:
            by_name.setdefault(transfer.collective, []).append(transfer)
        return {name: fit_link(items) for name, items in by_name.items() if len(items) > 1}

    def link_bandwidth(self) -> float | None:
        """Return the median bandwidth of the three collectives, bytes/s; `None` when none could be fitted."""
        rates = sorted(link.bandwidth for link in self.links().values())
        return rates[len(rates) // 2] if rates else None

    def collective_seconds(self) -> float | None:
        """Return the median latency of the three collectives; `None` when none could be fitted."""
        starts = sorted(link.latency_seconds for link in self.links().values())
        return starts[len(starts) // 2] if starts else None


TYPICAL = "MLP of a 7B model"


def fit_link(transfers: Sequence[Transfer]) -> Link:
    """Return the latency and bandwidth with the smallest sum of squared relative errors.

    Args:
        transfers: one collective at two sizes or more.
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
        # Noise or caches can make small transfers too fast or too slow for a line: then the largest transfer decides.
        largest = max(transfers, key=lambda item: item.link_bytes)
        return Link(0.0, largest.link_bytes / largest.seconds)
    return Link(latency, 1 / inverse)
