"""The measurements of one rank, which `rm-scale bench hardware` starts on every rank at once."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rm_scale.distributed import (
    World,
    detect_world,
    gather_from_ranks,
    has_gpu,
    init_process_group,
    prepare_environment,
)
from rm_scale.guard import leave
from rm_scale.hardware_bench.measured import MIB, TYPICAL, Layers, Measured, Product, Transfer

# Name, inputs and outputs; the number of tokens is chosen so that a product takes a suitable time.
_LAYERS = (
    ("attention of a 1B", 2048, 2048),
    ("MLP of a 1B model", 2048, 8192),
    ("attention of a 7B", 4096, 4096),
    (TYPICAL, 4096, 11008),
    ("square", 8192, 8192),
)
_MAX_TOKENS = 8192
_MIN_TOKENS = 256
_SHARES = {"products": 0.35, "layers": 0.15, "memory": 0.15, "transfers": 0.35}
"""Shares of the time that each kind of measurement gets."""
_SIZES = tuple(4**power * MIB for power in range(5))
"""Bytes: 1, 4, 16, 64, 256 MiB."""
_MAX_REPEATS = 20
_TIMEOUT_SECONDS = 300


def main() -> int:
    """Measure; rank 0 writes the result. The only argument is JSON: `{"answer": FILE, "seconds": N}`."""
    job = json.loads(sys.argv[1])
    world = detect_world()
    prepare_environment(world, meets=True)
    init_process_group(world, uses_deepspeed=False, timeout_seconds=_TIMEOUT_SECONDS)
    measured = measure_rank(world, float(job["seconds"]))
    if world.is_main:
        Path(job["answer"]).write_text(json.dumps(asdict(measured)), encoding="utf-8")
    return 0


def measure_rank(world: World, seconds: float) -> Measured:
    """Make all measurements together with the other ranks; every rank returns the same.

    Args:
        world: this rank's place.
        seconds: time for all measurements together.
    """
    import torch

    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_gpu() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    memory = available_bytes(device, world)
    dtype = product_dtype(device)
    products = tuple(time_products(device, dtype, memory, _SHARES["products"] * seconds))
    share = _SHARES["layers"] * seconds / 2
    narrow, wide = (time_layers(layers, device, dtype, share) for layers in layers_to_time(device.type))
    bandwidth = time_memory(device, memory, _SHARES["memory"] * seconds)
    transfers = tuple(time_transfers(world, device, memory, _SHARES["transfers"] * seconds)) if world.size > 1 else ()
    return Measured(
        device=device.type,
        device_name=_name_of(device),
        dtype=str(dtype).removeprefix("torch."),
        num_ranks=world.size,
        num_threads=torch.get_num_threads(),
        memory_bytes=memory,
        products=products,
        layers=(narrow, wide),
        memory_bandwidth=bandwidth,
        backend="" if world.size == 1 else "nccl" if device.type == "cuda" else "gloo",
        transfers=transfers,
        versions=_versions(device),
    )


def available_bytes(device: Any, world: World) -> float:
    """Return the memory that one process can use: its GPU's, or a rank's share of the machine's free memory."""
    import torch

    from rm_scale.doctor.checks_machine import available_memory

    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    # Each rank looks at another moment; the smallest figure is the same for all.
    return float(min(gather_from_ranks(available_memory()))) / world.ranks_on_node


def product_dtype(device: Any) -> Any:
    """Return bfloat16 where the hardware multiplies it, else float32."""
    import torch

    from rm_scale.doctor.checks_machine import judge_bfloat16, processor_flags

    if device.type == "cuda":
        good = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        good = judge_bfloat16([], processor_flags()).status == "pass"
    return torch.bfloat16 if good else torch.float32


def _name_of(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions(device: Any) -> dict[str, str]:
    import torch

    found = {"torch": torch.__version__, "python": platform.python_version(), "cuda": str(torch.version.cuda)}
    if device.type == "cuda":
        found["nccl"] = ".".join(str(part) for part in torch.cuda.nccl.version())
    return found


# --- Timing ----------------------------------------------------------------------------------------------------------


def median_seconds(work: Callable[[], object], device: Any, budget_seconds: float, at_least: int = 3) -> float:
    """Time work that all ranks do at once, and return the slowest rank's median in seconds.

    Two runs to warm up are left out.

    Args:
        work: what to time; called equally often on every rank.
        device: whose queue of work is waited for after each call.
        budget_seconds: time for all repeats, of which there are `at_least` to 20; the same on all ranks.
        at_least: fewest repeats.
    """
    once = _timed(work, device)  # compiles kernels, touches memory
    once = max(gather_from_ranks(min(once, _timed(work, device))))
    repeats = min(_MAX_REPEATS, max(at_least, int(budget_seconds / max(once, 1e-9))))
    return float(max(gather_from_ranks(statistics.median(_timed(work, device) for _ in range(repeats)))))


def _timed(work: Callable[[], object], device: Any) -> float:
    import torch

    from rm_scale.distributed import barrier

    barrier()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def time_products(device: Any, dtype: Any, memory_bytes: float, budget_seconds: float) -> Iterator[Product]:
    """Time the matrix products of linear layers.

    Args:
        device: where.
        dtype: of both factors.
        memory_bytes: that this rank may use; weights larger than a twentieth of it are left out.
        budget_seconds: for all of them.
    """
    import torch

    share = budget_seconds / len(_LAYERS)
    rate = _quick_rate(device, dtype)
    for what, inputs, outputs in _LAYERS:
        if inputs * outputs * dtype.itemsize > memory_bytes / 20:
            continue
        # Five products must fit: two that warm up, three that count.
        tokens = fitting_tokens(rate * share / 5, inputs, outputs)
        left = torch.randn(tokens, inputs, device=device).to(dtype)
        right = torch.randn(outputs, inputs, device=device).to(dtype)
        out = torch.empty(tokens, outputs, device=device, dtype=dtype)

        def product(left: Any = left, right: Any = right, out: Any = out) -> None:
            # As nn.Linear does it: the weight is transposed.
            torch.mm(left, right.t(), out=out)

        seconds = median_seconds(product, device, 0.6 * share)
        yield Product(what, tokens, inputs, outputs, 2.0 * tokens * inputs * outputs / seconds)


def layers_to_time(device_type: str) -> tuple[Layers, Layers]:
    """Return the shapes of a narrow and a wide model as they are trained on such a device."""
    if device_type == "cuda":
        return Layers(4, 1024, 2048, 8192, 32, 2, 0.0), Layers(4, 1024, 4096, 11008, 32, 1, 0.0)
    return Layers(4, 256, 576, 1536, 9, 2, 0.0), Layers(2, 256, 2048, 5632, 32, 1, 0.0)


def time_layers(layers: Layers, device: Any, dtype: Any, budget_seconds: float) -> Layers:
    """Time whole decoder layers, forward and backward, and return them with their `seconds`.

    Args:
        layers: the shape.
        device: where.
        dtype: of weights and hidden states.
        budget_seconds: for all repeats.
    """
    import torch
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=8,
        hidden_size=layers.hidden_size,
        intermediate_size=layers.intermediate_size,
        num_attention_heads=layers.num_heads,
        num_key_value_heads=layers.num_heads,
        num_hidden_layers=layers.num_layers,
        attn_implementation="sdpa",
    )
    model = LlamaModel(config).to(device=device, dtype=dtype)
    inputs = torch.randn(layers.rows, layers.tokens, layers.hidden_size, device=device).to(dtype).requires_grad_()

    def pass_through() -> None:
        model(inputs_embeds=inputs, use_cache=False).last_hidden_state.sum().backward()
        model.zero_grad()

    return replace(layers, seconds=median_seconds(pass_through, device, budget_seconds))


def fitting_tokens(flops: float, inputs: int, outputs: int) -> int:
    """Return the largest power of two of tokens, within 256 to 8192, whose product has at most `flops` operations."""
    tokens = flops / (2.0 * inputs * outputs)
    return int(min(_MAX_TOKENS, max(_MIN_TOKENS, 2 ** math.floor(math.log2(max(1.0, tokens))))))


def _quick_rate(device: Any, dtype: Any) -> float:
    """Return the FLOP/s of a small product, from which the sizes of the others follow; the same on all ranks."""
    import torch

    size = 1024
    factor = torch.randn(size, size, device=device).to(dtype)
    seconds = median_seconds(lambda: torch.mm(factor, factor), device, budget_seconds=0.1)
    return float(2.0 * size**3 / seconds)


def time_memory(device: Any, memory_bytes: float, budget_seconds: float) -> dict[str, float]:
    """Time copy and triad (a = b + s c) of tensors far larger than any cache; return bytes/s as STREAM counts them.

    A processor also reads what it is about to overwrite, which is not counted.
    """
    import torch

    wanted = (1024 if device.type == "cuda" else 256) * MIB
    length = int(min(wanted, memory_bytes / 20)) // 4
    first, second = torch.zeros(length, device=device), torch.ones(length, device=device)
    out = torch.empty(length, device=device)
    works: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2, lambda: out.copy_(first)),
        "triad": (3, lambda: torch.add(first, second, alpha=3.0, out=out)),
    }
    return {
        name: 4.0 * length * num_streams / median_seconds(work, device, budget_seconds / 2)
        for name, (num_streams, work) in works.items()
    }


def time_transfers(world: World, device: Any, memory_bytes: float, budget_seconds: float) -> Iterator[Transfer]:
    """Time the three collectives of training from 1 to 256 MiB; stop at the size where time or memory is used up."""
    share = budget_seconds / 3
    for collective in ("all_reduce", "all_gather", "reduce_scatter"):
        # All ranks must stop at the same size and repeat equally often, so rank 0's clock decides.
        started = time.perf_counter()
        last = 0.0
        for num_bytes in _SIZES:
            left = gather_from_ranks(share - (time.perf_counter() - started))[0]
            # The next size takes four times as long, and it is run five times at least: two to warm up, three timed.
            if num_bytes > _SIZES[1] and (20 * last > left or 4 * num_bytes > memory_bytes / 2):
                break
            work = _collective(collective, world, device, num_bytes)
            last = median_seconds(work, device, left / 3)
            yield Transfer(collective, num_bytes, link_bytes(collective, num_bytes, world.size), last)


def link_bytes(collective: str, num_bytes: int, num_ranks: int) -> float:
    """Return the bytes that a ring sends over each rank's link (Patarasu and Yuan, 2009)."""
    return (2 if collective == "all_reduce" else 1) * (num_ranks - 1) / num_ranks * num_bytes


def _collective(name: str, world: World, device: Any, num_bytes: int) -> Callable[[], object]:
    import torch
    from torch import distributed as dist

    length = num_bytes // 4 // world.size
    whole, part = torch.zeros(length * world.size, device=device), torch.zeros(length, device=device)
    works: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_single(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_single(part, whole),
    }
    return works[name]


if __name__ == "__main__":
    leave(main())
