"""How long an optimizer step takes: computing, communicating, updating; a band where they overlap.

A step lies between the longer of computing and communicating (they overlap completely) and their sum (not at all).
"""

from __future__ import annotations

from dataclasses import dataclass

from rm_scale.planning import network
from rm_scale.planning.compute import StepFlops, linear_parameters, step_flops
from rm_scale.planning.parameters import total
from rm_scale.planning.scenario import Scenario

ATTENTION_SHARES = {"flash1": 0.45}
"""Rate of older attention kernels over that of linear layers; `ATTENTION_SHARE` for all others."""

ATTENTION_SHARE = 0.73
"""Rate of attention kernels over that of linear layers (flash-attention 2 on A800: 174 of 238 TFLOP/s)."""

ELEMENTWISE_BYTES = 200.0
"""Memory traffic of norms, activations, residuals and casts per token, layer and unit of hidden size, forward and
backward. Every byte kept for the backward pass (45 of them, see `activations`) is written once and read
more than once; 200 fits small and large models alike (docs/planning_validation.md)."""

BACKWARD_ATTENTION = 2.5
"""Backward over forward operations of attention, which recomputes its weights (flash-attention, arXiv 2205.14135)."""

DEQUANTISE_BYTES = 8.0
"""Memory traffic per 4-bit weight and pass; litgpt on an A100-40: 3.7 to 7.5 ms per 1e9 weights and pass."""

UPDATE_BYTES = 30.0
"""Memory traffic of AdamW per weight: master and both moments read and written, gradient read, weight written."""

HOST_BANDWIDTH = 100e9
"""Bytes/s of a node's memory, shared by its ranks, when the optimizer runs there."""

HOST_LINK = 25e9
"""Bytes/s between a device and its node's memory (PCIe 4 x16)."""

NVME_BANDWIDTH = 6e9
"""Bytes/s of a node's NVMe disks."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step and its parts.

    Attributes:
        compute: of one micro-step, forward and backward.
        communication: of one micro-step's collectives.
        step_communication: of collectives once per step.
        update: of the optimizer.
        num_micro_steps: per optimizer step.
    """

    compute: float
    communication: float
    step_communication: float
    update: float
    num_micro_steps: float

    @property
    def low(self) -> float:
        """Communication hidden behind computing as far as it goes."""
        return self.num_micro_steps * max(self.compute, self.communication) + self._once

    @property
    def high(self) -> float:
        """Nothing overlaps."""
        return self.num_micro_steps * (self.compute + self.communication) + self._once

    @property
    def _once(self) -> float:
        return self.step_communication + self.update

    @property
    def bound_by(self) -> str:
        """compute or communication."""
        communicating = self.num_micro_steps * self.communication + self.step_communication
        return "communication" if communicating > self.num_micro_steps * self.compute else "compute"


def step_time(scenario: Scenario) -> StepTime:
    """Predict a step's time."""
    return StepTime(
        compute=compute_seconds(scenario),
        communication=network.micro_step_seconds(scenario),
        step_communication=network.step_seconds(scenario),
        update=update_seconds(scenario),
        num_micro_steps=scenario.num_micro_steps,
    )


@dataclass(frozen=True)
class ExecutedFlops:
    """Operations that one device really does in a micro-step: recomputed, shared and padded ones as they come."""

    linear: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.linear + self.attention + self.head


def executed_flops(scenario: Scenario) -> ExecutedFlops:
    """Count a micro-step's operations; causal attention at half."""
    shape, load = scenario.shape, scenario.load
    recomputed = 1.0 if scenario.checkpointing else 0.0
    passes = recomputed + (3.0 if scenario.method == "full" else 2.0)
    adapters = total(scenario.adapters) * (3.0 + recomputed)
    linear = 2.0 * load.tokens * (linear_parameters(shape) * passes + adapters)
    attention = 2.0 * shape.num_layers * shape.query_size * load.squared * (1.0 + recomputed + BACKWARD_ATTENTION)
    head = 0.0
    if scenario.head != "score":
        head = 2.0 * load.tokens * shape.vocab_size * shape.hidden_size * (3.0 if scenario.method == "full" else 2.0)
    return ExecutedFlops(linear, attention, head)


def useful_flops(scenario: Scenario) -> float:
    """Operations of the unshared pairs on real tokens, for MFU."""
    frozen = scenario.num_frozen if scenario.method != "full" else 0
    per_step: StepFlops = step_flops(scenario.shape, scenario.num_trained, frozen)
    return per_step.of(scenario.load.effective_tokens, scenario.load.effective_squared)


def compute_seconds(scenario: Scenario) -> float:
    """Time of a micro-step's computation on one device."""
    flops, device = executed_flops(scenario), scenario.device
    rate = device.matmul_flops * device.step_efficiency
    share = ATTENTION_SHARES.get(scenario.attention, ATTENTION_SHARE)
    working = (flops.linear + flops.head) / rate + flops.attention / (rate * share)
    return floor_seconds(scenario) + working + elementwise_seconds(scenario)


def elementwise_seconds(scenario: Scenario) -> float:
    """Operations that move more than they compute; recomputing does a third of them again."""
    shape, passes = scenario.shape, 4 / 3 if scenario.checkpointing else 1.0
    moved = ELEMENTWISE_BYTES * passes * scenario.load.tokens * shape.num_layers * shape.hidden_size
    return moved / scenario.device.memory_bandwidth


def floor_seconds(scenario: Scenario) -> float:
    """What a micro-step takes however few tokens it has: kernel launches, reading weights, undoing 4-bit weights."""
    passes = 3 if scenario.checkpointing else 2
    launches = scenario.shape.num_layers * scenario.device.layer_seconds * passes / 3
    read = total(scenario.backbone) * scenario.weight_bytes * passes / scenario.device.memory_bandwidth
    return launches + read + dequantise_seconds(scenario)


def dequantise_seconds(scenario: Scenario) -> float:
    """Turning 4-bit weights into the compute type, in each pass of a micro-step."""
    if scenario.method != "qlora":
        return 0.0
    passes = 3 if scenario.checkpointing else 2
    return linear_parameters(scenario.shape) * passes * DEQUANTISE_BYTES / scenario.device.memory_bandwidth


def update_seconds(scenario: Scenario) -> float:
    """The optimizer on this rank's share."""
    if not scenario.optimizer_bytes:
        return 0.0
    share = scenario.num_trained / (scenario.num_devices if scenario.zero_stage else 1)
    if scenario.offload_optimizer == "none":
        return share * UPDATE_BYTES / scenario.device.memory_bandwidth
    if scenario.device.is_cpu:
        return share * UPDATE_BYTES / scenario.device.memory_bandwidth
    in_node = share * scenario.devices_per_node
    moved = share * 2 * scenario.weight_bytes / HOST_LINK
    if scenario.offload_optimizer == "nvme":
        return moved + in_node * 2 * (scenario.optimizer_bytes + scenario.master_bytes) / NVME_BANDWIDTH
    return moved + in_node * UPDATE_BYTES / HOST_BANDWIDTH
