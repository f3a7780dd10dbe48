"""What to run: the fastest way that fits, or the one that needs the least memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rm_scale.planning.estimate import Estimate, estimate
from rm_scale.planning.group_lengths import LengthMix
from rm_scale.planning.hardware import Device
from rm_scale.planning.scenario import Method, Scenario
from rm_scale.planning.shape import ModelShape

Offload = Literal["none", "optimizer", "all", "nvme"]

CLEARLY_FASTER = 1.03
"""A way that is harder to run must be at least this much faster than a simpler one."""


@dataclass(frozen=True)
class Request:
    """What a user has and wants. Fields that are `None` are for the planner to choose.

    Attributes:
        name: of the model, for people.
        shape: the model's.
        method: full, lora or qlora.
        device, num_devices, num_nodes: the machine.
        max_length: longest sequence.
        lengths: of the data, cut at max_length.
        packing: none, padding_free or prefix_shared.
        global_batch_size: groups per optimizer step.
        zero_stage: 0 (none) to 3.
        offload: what leaves the device.
        checkpointing: recompute activations.
        max_tokens: tokens of a row.
        micro_batch: groups of a padded micro-batch.
        hpz: use a second partition within each node.
        lora_rank, lora_targets, lora_parameters, nested_quant: as in a run.
        notes: what was decided for the user, one sentence each.
    """

    name: str
    shape: ModelShape
    method: Method
    device: Device
    num_devices: int
    num_nodes: int
    max_length: int
    lengths: LengthMix
    packing: str = "prefix_shared"
    global_batch_size: int = 128
    zero_stage: int | None = None
    offload: Offload | None = None
    checkpointing: bool | None = None
    max_tokens: int | None = None
    micro_batch: int | None = None
    hpz: bool = False
    lora_rank: int = 16
    lora_targets: tuple[str, ...] | None = None
    lora_parameters: tuple[str, ...] = ()
    nested_quant: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """One way to run a request.

    Attributes:
        zero_stage: 0 means no ZeRO.
        offload: what leaves the device.
        checkpointing: recompute activations.
        max_tokens: tokens of the largest micro-step.
        micro_batch: groups of a padded micro-batch, `None` with packed rows.
        estimate: what it takes.
    """

    zero_stage: int
    offload: Offload
    checkpointing: bool
    max_tokens: int
    micro_batch: int | None
    estimate: Estimate

    @property
    def trouble(self) -> tuple[int, int, int]:
        """What makes it harder to run, as a sort key: offload first, then the ZeRO stage, then recomputing."""
        return (("none", "optimizer", "all", "nvme").index(self.offload), self.zero_stage, int(self.checkpointing))

    def describe(self) -> str:
        """Name the ZeRO stage, the offload and checkpointing in a few words."""
        zero = f"ZeRO-{self.zero_stage}" if self.zero_stage else "no ZeRO"
        parts = [zero]
        if self.offload != "none":
            parts.append(
                {"optimizer": "optimizer on the host", "all": "all on the host", "nvme": "all on NVMe"}[self.offload]
            )
        parts.append("checkpointing" if self.checkpointing else "no checkpointing")
        return ", ".join(parts)


def choices(request: Request) -> Iterator[Choice]:
    """Yield all ways to run a request, with what each takes."""
    for stage in _stages(request):
        for offload in _offloads(request, stage):
            for checkpointing in [request.checkpointing] if request.checkpointing is not None else [False, True]:
                for max_tokens, micro_batch in _row_sizes(request):
                    scenario = build_scenario(request, stage, offload, checkpointing, max_tokens, micro_batch)
                    yield Choice(stage, offload, checkpointing, max_tokens, micro_batch, estimate(scenario))


def recommend(request: Request) -> Choice:
    """Choose the fastest way that fits; when none fits, the one that needs the least memory."""
    ways = list(choices(request))
    fitting = [way for way in ways if way.estimate.fits]
    if not fitting:
        return min(ways, key=lambda way: max(way.estimate.peak_memory_bytes, way.estimate.load_peak_memory_bytes))
    fastest = min(way.estimate.time.high for way in fitting)
    near = [way for way in fitting if way.estimate.time.high <= fastest * CLEARLY_FASTER]
    return min(near, key=lambda way: (way.trouble, way.estimate.time.high, way.max_tokens))


def _stages(request: Request) -> list[int]:
    if request.zero_stage is not None:
        return [request.zero_stage]
    if request.offload in {"all", "nvme"}:
        return [3]  # weights leave the device under ZeRO-3 only
    if request.num_devices == 1:
        stages = [0, 2, 3] if request.method == "full" else [0, 3]
    else:
        stages = [1, 2, 3] if request.method == "full" else [0, 2, 3]
    return [stage for stage in stages if stage > 0 or request.offload in {None, "none"}]


def _offloads(request: Request, stage: int) -> list[Offload]:
    if request.offload is not None:
        return [request.offload]
    if stage <= 1:  # with the optimizer on the host ZeRO-2 does the same and holds fewer gradients
        return ["none"]
    return ["none", "optimizer", "all"] if stage == 3 else ["none", "optimizer"]


def _row_sizes(request: Request) -> list[tuple[int, int | None]]:
    """Return sizes to try: tokens of the largest micro-step, and its groups when they are padded (else `None`)."""
    share = max(1.0, request.global_batch_size / request.num_devices)
    if request.packing == "none":
        batches = [request.micro_batch] if request.micro_batch else [1, 2, 4, 8, 16, 32]
        sizes = [batch for batch in batches if batch <= share] or [1]
        return [(2 * batch * request.max_length, batch) for batch in sizes]
    if request.max_tokens is not None:
        return [(request.max_tokens, None)]
    # A row must hold the longest group there can be: two responses that share nothing.
    least = 2 * request.max_length
    whole_share = share * request.lengths.mean_tokens(request.packing)
    sizes = [least]
    while sizes[-1] < whole_share and len(sizes) < 6:
        sizes.append(sizes[-1] * 2)
    return [(size, None) for size in sizes]


def build_scenario(
    request: Request, stage: int, offload: Offload, checkpointing: bool, max_tokens: int, micro_batch: int | None
) -> Scenario:
    """Build the scenario of one way to run a request."""
    load = (
        request.lengths.padded_load(micro_batch)
        if micro_batch is not None
        else request.lengths.packed_load(request.packing, max_tokens)
    )
    share = request.global_batch_size / request.num_devices
    micro_steps = max(1, math.ceil(share / load.groups - 1e-9))
    load = load.times(share / micro_steps / load.groups)
    per_node = math.ceil(request.num_devices / request.num_nodes)
    uses_engine = stage > 0
    return Scenario(
        shape=request.shape,
        device=request.device,
        num_devices=request.num_devices,
        num_nodes=request.num_nodes,
        load=load,
        max_row_tokens=max_tokens,
        num_micro_steps=micro_steps,
        method=request.method,
        lora_rank=request.lora_rank,
        lora_targets=request.lora_targets,
        lora_parameters=request.lora_parameters,
        nested_quant=request.nested_quant,
        zero_stage=stage if uses_engine else None,
        offload_optimizer={"none": "none", "optimizer": "cpu", "all": "cpu", "nvme": "nvme"}[offload],
        offload_param={"none": "none", "optimizer": "none", "all": "cpu", "nvme": "nvme"}[offload],
        hpz=per_node if request.hpz and stage == 3 else 1,
        precision="bf16" if uses_engine else "amp",
        checkpointing=checkpointing,
        packed=micro_batch is None,
        attention="matmul" if request.device.is_cpu else "varlen",
    )
