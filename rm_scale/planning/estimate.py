"""What a scenario takes: does it fit, how fast is it, what does it cost. Everything here is a prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rm_scale.planning.activations.activation_memory import ActivationMemory, activations_of
from rm_scale.planning.host_link import gradient_copy_seconds, weight_copy_seconds
from rm_scale.planning.host_memory import (
    held_block_bytes,
    offload_buffer_bytes,
    stays_in_memory,
    update_block_bytes,
)
from rm_scale.planning.memory import frozen_bytes, model_states, offloaded_weight_bytes, stored_elements
from rm_scale.planning.network import micro_step_seconds
from rm_scale.planning.parameters import total
from rm_scale.planning.scenario import Scenario
from rm_scale.planning.step_time import StepTime, compute_seconds, step_time, useful_flops

RESERVE = 0.05
"""Share of a device's memory left free: what the allocator can't hand out because it is in pieces."""

PYTHON_BYTES = 1.2e9
"""Host memory of a process with torch, transformers and DeepSpeed loaded."""


@dataclass(frozen=True)
class Estimate:
    """What the planner says about a scenario.

    Attributes:
        scenario: what was estimated.
        memory: bytes per device by part, at the moment of the peak.
        peak_memory_bytes: their sum.
        load_peak_memory_bytes: most bytes on a device while the model is loaded and the engine is made.
        host_memory_bytes: of one node, all its ranks together.
        nvme_bytes: of one node.
        time: of a step.
    """

    scenario: Scenario
    memory: dict[str, int]
    peak_memory_bytes: int
    load_peak_memory_bytes: int
    host_memory_bytes: int
    nvme_bytes: int
    time: StepTime

    @property
    def limit_bytes(self) -> float:
        """What a device offers, less the reserve. Ranks on processors share it where its figures are for fewer."""
        device, ranks = self.scenario.device, self.scenario.devices_per_node
        share = min(1.0, device.devices_per_node / ranks) if device.is_cpu else 1.0
        return device.memory_bytes * share * (1 - RESERVE)

    @property
    def fits(self) -> bool:
        """Both peaks are below the limit."""
        return max(self.peak_memory_bytes, self.load_peak_memory_bytes) <= self.limit_bytes

    @property
    def groups_per_step(self) -> float:
        """Groups of one optimizer step, over all devices."""
        scenario = self.scenario
        return scenario.load.groups * scenario.num_micro_steps * scenario.num_devices

    @property
    def pairs_per_second(self) -> tuple[float, float]:
        """Groups per second over all devices, slow and fast end."""
        return self.groups_per_step / self.time.high, self.groups_per_step / self.time.low

    @property
    def tokens_per_second_per_device(self) -> tuple[float, float]:
        """Processed tokens, slow and fast end."""
        tokens = self.scenario.load.tokens * self.scenario.num_micro_steps
        return tokens / self.time.high, tokens / self.time.low

    @property
    def mfu(self) -> tuple[float, float]:
        """Useful operations over the device's peak, slow and fast end."""
        useful = useful_flops(self.scenario) * self.scenario.num_micro_steps / self.scenario.device.peak_flops
        return useful / self.time.high, useful / self.time.low

    def hours(self, num_pairs: float) -> tuple[float, float]:
        """Return the hours for so many groups, fast and slow end."""
        slow, fast = self.pairs_per_second
        return num_pairs / fast / 3600, num_pairs / slow / 3600

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints, under the names that docs/planning.md promises to scripts."""
        low, high = self.time.low, self.time.high
        return {
            "predicted": True,
            "fits": self.fits,
            "peak_memory_bytes": self.peak_memory_bytes,
            "load_peak_memory_bytes": self.load_peak_memory_bytes,
            "host_memory_bytes_per_node": self.host_memory_bytes,
            "nvme_bytes_per_node": self.nvme_bytes,
            "memory_limit_bytes": int(self.limit_bytes),
            "memory": self.memory,
            "step_seconds": {"low": low, "high": high},
            "tokens_per_second_per_device": _band(self.tokens_per_second_per_device),
            "pairs_per_second": _band(self.pairs_per_second),
            "mfu": _band(self.mfu),
            "bound_by": self.time.bound_by,
        }


def _band(values: tuple[float, float]) -> dict[str, float]:
    return {"low": min(values), "high": max(values)}


def estimate(scenario: Scenario) -> Estimate:
    """Predict memory and time of a scenario."""
    memory = peak_memory(scenario)
    return Estimate(
        scenario=scenario,
        memory=memory,
        peak_memory_bytes=sum(memory.values()),
        load_peak_memory_bytes=load_peak_bytes(scenario),
        host_memory_bytes=host_memory_bytes(scenario),
        nvme_bytes=nvme_bytes(scenario),
        time=step_time(scenario),
    )


def peak_memory(scenario: Scenario) -> dict[str, int]:
    """Return the bytes per device, by part, when most is held: in the backward pass or while the optimizer steps."""
    lasting = _lasting(scenario)
    activation_bytes = activations(scenario).peak_bytes
    passing = {
        "gathered_weights": gathered_bytes(scenario),
        "activations": activation_bytes,
        "communication_buffers": bucket_bytes(scenario),
    }
    overhead = {"framework": int(scenario.device.context_bytes) + collective_bytes(scenario)}
    if scenario.device.is_cpu:
        passing["optimizer_step"] = update_block_bytes(scenario)
        overhead["held_blocks"] = held_block_bytes(scenario, activation_bytes, lasting["gradients"])
    elif (update := update_bytes(scenario)) > sum(passing.values()):
        passing = dict.fromkeys(passing, 0) | {"optimizer_step": update}
    return {name: int(size) for name, size in {**lasting, **passing, **overhead}.items()}


def _lasting(scenario: Scenario) -> dict[str, int]:
    """Return what stays for the whole run in a device's memory; a processor's is the host's, offloaded or not."""
    states = model_states(scenario)
    optimizer_stays = stays_in_memory(scenario, scenario.offload_optimizer)
    weights_stay = stays_in_memory(scenario, scenario.offload_param)
    lasting = {
        "weights": states.weights + states.second_weights - (0 if weights_stay else offloaded_weight_bytes(scenario)),
        "gradients": states.gradients if optimizer_stays or scenario.zero_stage != 3 else 0,
        "optimizer": states.masters + states.moments if optimizer_stays else 0,
    }
    if scenario.device.is_cpu:
        lasting["offload_buffers"] = offload_buffer_bytes(scenario)
    return lasting


def offloaded_parts(scenario: Scenario) -> dict[str, tuple[int, str]]:
    """Return of each part of the memory table the bytes that a rank keeps on its node instead, and where.

    That is cpu or nvme.
    """
    states = model_states(scenario)
    parts: dict[str, tuple[int, str]] = {}
    if scenario.offload_param != "none":
        parts["weights"] = (offloaded_weight_bytes(scenario), scenario.offload_param)
    if scenario.offload_optimizer != "none":
        if scenario.zero_stage == 3:
            parts["gradients"] = (states.gradients, scenario.offload_optimizer)
        parts["optimizer"] = (states.masters + states.moments, scenario.offload_optimizer)
    return parts


_KNOWN: dict[tuple[object, ...], ActivationMemory] = {}


def activations(scenario: Scenario) -> ActivationMemory:
    """Predict the activations of the largest micro-step, including the one 4-bit weight that is dequantised.

    They don't depend on how states are sharded, so that scenarios which differ in that alone share one prediction.
    """
    reentrant = scenario.method != "full" and scenario.zero_stage == 3
    adapters = (scenario.lora_rank, scenario.lora_targets, scenario.lora_parameters, scenario.lora_dropout)
    kind = (scenario.method, *adapters, scenario.precision)
    how = (scenario.checkpointing, reentrant, scenario.attention, scenario.head, scenario.packed)
    key = (scenario.shape, scenario.load, scenario.largest_tokens, *kind, *how)
    if key not in _KNOWN:
        _KNOWN[key] = activations_of(scenario)
    return _KNOWN[key]


def gathered_bytes(scenario: Scenario) -> int:
    """Return the bytes of whole weights that ZeRO-3 holds at once: it gathers ahead until `live` elements are there.

    The tensor that passes the limit is gathered whole; and what the module at work needs is gathered whatever the
    limit: of a mixture all experts of a layer, which are one module, beside what else its layer and the next have.
    Elements are those of storage: of 4-bit weights four are in one.
    """
    if scenario.zero_stage != 3 or not _is_gathered(scenario):
        return 0
    stored = [(tensor, tensor.numel) for tensor in scenario.trained]
    stored += [(tensor, stored_elements(scenario, tensor)) for tensor in scenario.frozen]
    elements = sum(tensor.count * numel for tensor, numel in stored)
    largest = max(numel for _, numel in stored)
    zero = scenario.zero
    live = zero.live + max(zero.prefetch, largest)
    of_experts = sum(numel for tensor, numel in stored if tensor.role == "experts")
    if of_experts:
        rest = sum(tensor.count * numel for tensor, numel in stored if tensor.role not in {"experts", "embedding"})
        live = max(live, of_experts + 2 * rest / scenario.shape.num_layers + zero.prefetch)
    return int(min(elements, live) * scenario.weight_bytes)


def _is_gathered(scenario: Scenario) -> bool:
    """Tell whether weights are made anew for use: gathered from other ranks, or copied from the host by a single one.

    A single rank uses the weights that it holds, and so does a processor with those in its own memory.
    """
    return scenario.num_devices > 1 or (scenario.offload_param != "none" and not scenario.device.is_cpu)


def bucket_bytes(scenario: Scenario) -> int:
    """Return the bytes of gradients being reduced: DDP's copy of all of them, or ZeRO's buckets."""
    if scenario.num_devices == 1 and scenario.zero_stage is None:
        return 0
    if scenario.zero_stage is None:
        return scenario.num_trained * 4
    buckets = 2 if scenario.zero.overlaps else 1
    bucket = min(scenario.zero.reduce, scenario.num_trained)
    return int(buckets * bucket * scenario.weight_bytes)


def update_bytes(scenario: Scenario) -> int:
    """Return what the optimizer needs while it steps: fp32 gradients and a temporary of a sub-group's size."""
    if not scenario.optimizer_bytes or scenario.offload_optimizer != "none":
        return 0
    share = scenario.num_trained / (scenario.num_devices if scenario.zero_stage else 1)
    at_once = min(share, scenario.zero.sub_group) if scenario.zero_stage == 3 else share
    if not scenario.master_bytes:
        return 0  # weights updated as they are, by a fused optimizer
    return int(at_once * ((4 if scenario.zero_stage else 0) + 4))


def collective_bytes(scenario: Scenario) -> int:
    """Return NCCL's own buffers: more across nodes, and some on a single device too under DeepSpeed's engine."""
    if scenario.device.is_cpu or (scenario.num_devices == 1 and scenario.zero_stage is None):
        return 0
    return int(0.5e9 if scenario.num_nodes == 1 else 0.9e9)


def load_peak_bytes(scenario: Scenario) -> int:
    """Return the most bytes that a device holds before the first step.

    A quantised model is loaded whole on each rank before it is sharded; ZeRO-3 shards any other while it is read, and
    puts the parts where they are offloaded to; ZeRO-1 and 2 copy what is trained into flat buffers.
    """
    states = model_states(scenario)
    sharded = states.weights
    if not stays_in_memory(scenario, scenario.offload_param):
        sharded += states.second_weights - offloaded_weight_bytes(scenario)
    size = scenario.weight_bytes
    whole = total(scenario.trained) * size + frozen_bytes(scenario)
    largest = max(tensor.numel for tensor in scenario.backbone) * size
    if scenario.method == "qlora":
        peak = whole + largest + (sharded if scenario.zero_stage == 3 else 0)
    elif scenario.zero_stage == 3:
        peak = sharded + 2 * largest
    elif scenario.zero_stage:
        peak = whole + total(scenario.trained) * size
    else:
        peak = whole
    ready = sum(_lasting(scenario).values()) if scenario.device.is_cpu else states.on_device
    return int(max(peak, ready) + scenario.device.context_bytes + collective_bytes(scenario))


def host_memory_bytes(scenario: Scenario) -> int:
    """Return the bytes of one node's memory: processes, weights while they are read, and what is offloaded.

    On processors that is what all of its ranks hold together; files that they read are in memory once, and given up
    when something else needs it.
    """
    ranks = scenario.devices_per_node
    if scenario.device.is_cpu:
        return ranks * max(sum(peak_memory(scenario).values()), load_peak_bytes(scenario))
    reading = total(scenario.backbone) * 2
    offloaded = "cpu" in {scenario.offload_optimizer, scenario.offload_param}
    kept = (model_states(scenario).offloaded + offload_buffer_bytes(scenario)) * ranks if offloaded else 0
    return int(ranks * PYTHON_BYTES + max(reading, kept))


def nvme_bytes(scenario: Scenario) -> int:
    """Return the bytes that one node keeps on its disk."""
    if "nvme" not in {scenario.offload_optimizer, scenario.offload_param}:
        return 0
    return model_states(scenario).offloaded * scenario.devices_per_node


def tokens_to_hide_communication(scenario: Scenario) -> float:
    """Return the tokens per device and micro-step from which on computing takes longer than moving weights.

    Weights are moved by collectives, and from the host where they are offloaded; gradients to the host and back.
    """
    moving = micro_step_seconds(scenario) + weight_copy_seconds(scenario) + gradient_copy_seconds(scenario)
    computing = compute_seconds(scenario)
    return scenario.load.tokens * moving / computing if computing > 0 else math.inf
