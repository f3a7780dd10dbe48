"""What a run holds on each device: model states exactly as DeepSpeed lays them out, activations, buffers, the rest.

Sources: ZeRO (arXiv 1910.02054) and DeepSpeed 0.19's own allocation (stage_1_and_2.py, stage3.py), which the tests
read back from real engines; bitsandbytes' 4-bit layout (64 weights per block with one fp32 constant).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rm_scale.planning.parameters import Tensor, each, total
from rm_scale.planning.scenario import Scenario

BLOCK_4BIT = 64
"""Weights that share one constant in bitsandbytes' 4-bit formats."""

NESTED_BLOCK = 256
"""Constants that share one of their own with double quantisation."""


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one rank, for as long as the run lasts.

    Attributes:
        weights: the copy that the forward pass reads: whole, or this rank's partition and the small tensors that
            stay whole.
        second_weights: hpZ's second partition, shared among the ranks of one node.
        masters: fp32 copies of trained weights.
        moments: optimizer state.
        gradients: what is kept from one micro-step to the next, or until the step.
        offloaded: bytes of these that are in the node's memory or on its disk rather than on the device.
    """

    weights: int
    second_weights: int
    masters: int
    moments: int
    gradients: int
    offloaded: int

    @property
    def on_device(self) -> int:
        """Bytes on the device."""
        parts = self.weights + self.second_weights + self.masters + self.moments + self.gradients
        return parts - self.offloaded


def model_states(scenario: Scenario) -> ModelStates:
    """Return the model states of one rank.

    Every rank holds the same number of bytes, but for the last partition's padding, which is counted.
    """
    weights = _weights(scenario)
    second = _second_weights(scenario)
    elements = partition_elements(scenario)
    masters = elements * scenario.master_bytes if scenario.zero_stage else 0
    moments = int(elements * scenario.optimizer_bytes)
    gradients = _gradients(scenario, elements)
    offloaded = masters + moments if scenario.offload_optimizer != "none" else 0
    if scenario.offload_optimizer != "none" and scenario.zero_stage == 3:
        offloaded += gradients
    offloaded += offloaded_weight_bytes(scenario)
    return ModelStates(weights, second, masters, moments, gradients, offloaded)


def offloaded_weight_bytes(scenario: Scenario) -> int:
    """Return the bytes of a rank's weights that are in its node's memory or on its disk.

    What stays on the device: small tensors, which ZeRO-3 keeps whole, and the constants of 4-bit weights, which are no
    parameters. hpZ's second partition goes where the first one is.
    """
    if scenario.zero_stage != 3 or scenario.offload_param == "none":
        return 0
    staying = whole_small_tensors(scenario) + quantisation_constant_bytes(scenario)
    return _weights(scenario) + _second_weights(scenario) - staying


def partition_elements(scenario: Scenario) -> int:
    """Count the trained elements whose masters and moments lie on one rank, padding included."""
    ranks = scenario.num_devices
    if not scenario.zero_stage:
        return scenario.num_trained
    if scenario.zero_stage == 3:
        return sum(math.ceil(numel / ranks) for numel in each(scenario.trained))
    return sum(_aligned(total(group), ranks) // ranks for group in _optimizer_groups(scenario.trained))


def held_gradient_elements(scenario: Scenario) -> float:
    """Count the gradients that ZeRO-1 or ZeRO-2 keeps on a rank's host between micro-steps, in the ranks' mean.

    A tensor that reaches into the parts of several ranks is kept whole by each. Of n elements, cut into parts of p, it
    reaches into 1 + n / p of them in the mean, wherever it begins; never into more than there are.
    Source: DeepSpeed's stage_1_and_2.py, async_accumulate_grad_in_cpu_via_gpu, called for tensors in a rank's part.
    """
    ranks, kept = scenario.num_devices, 0.0
    for group in _optimizer_groups(scenario.trained):
        part = _aligned(total(group), ranks) // ranks
        kept += sum(numel * min(ranks, 1 + numel / part) for numel in each(group)) / ranks
    return kept


def _optimizer_groups(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Divide tensors into those with weight decay and those without (biases and norms), as transformers does."""
    decayed = [tensor for tensor in tensors if tensor.role != "vector"]
    others = [tensor for tensor in tensors if tensor.role == "vector"]
    return [group for group in (decayed, others) if group]


def _aligned(elements: int, ranks: int) -> int:
    """Round a flat group up to a multiple of two elements per rank, as ZeRO-1 and 2 do."""
    return math.ceil(elements / (2 * ranks)) * 2 * ranks


def trained_weight_bytes(scenario: Scenario) -> int:
    """Return the bytes of a trained weight in the copy that the forward pass reads."""
    if scenario.zero_stage is not None:
        return scenario.weight_bytes
    if scenario.precision != "bf16" or (scenario.master_bytes and scenario.method != "full"):
        return 4  # adapters without an engine are their own master
    return scenario.weight_bytes


def _weights(scenario: Scenario) -> int:
    trained, frozen = scenario.trained, scenario.frozen
    trained_bytes = trained_weight_bytes(scenario)
    if scenario.zero_stage == 3:
        whole = whole_small_tensors(scenario)
        return whole + _sharded(scenario, trained, trained_bytes) + _frozen_sharded(scenario, frozen)
    if scenario.zero_stage:
        groups = [_aligned(total(group), scenario.num_devices) for group in _optimizer_groups(trained)]
        return sum(groups) * trained_bytes + frozen_bytes(scenario)
    return total(trained) * trained_bytes + frozen_bytes(scenario)


def frozen_bytes(scenario: Scenario) -> int:
    """Return the bytes of all frozen weights, unsharded; in 4 bits where they are quantised."""
    size = 4 if scenario.precision == "fp32" else 2
    if scenario.method != "qlora":
        return total(scenario.frozen) * size
    quantised = [tensor for tensor in scenario.frozen if tensor.is_4bit]
    others = [tensor for tensor in scenario.frozen if not tensor.is_4bit]
    return total(others) * size + sum(t.count * (_packed(t.numel) + constants_bytes(scenario, t)) for t in quantised)


def _packed(numel: int) -> int:
    return math.ceil(numel / 2)


def quantisation_constant_bytes(scenario: Scenario) -> int:
    """Return the bytes of all 4-bit weights' constants; 0 without any."""
    if scenario.method != "qlora":
        return 0
    return sum(tensor.count * constants_bytes(scenario, tensor) for tensor in scenario.frozen if tensor.is_4bit)


def constants_bytes(scenario: Scenario, tensor: Tensor) -> int:
    """Return the bytes of a 4-bit tensor's constants, which are never sharded."""
    blocks = math.ceil(tensor.numel / BLOCK_4BIT)
    if not scenario.nested_quant:
        return 4 * blocks
    return blocks + 4 * math.ceil(blocks / NESTED_BLOCK)


def _sharded(scenario: Scenario, tensors: Iterable[Tensor], size: int) -> int:
    ranks = scenario.num_devices
    return sum(math.ceil(numel / ranks) * size for numel in each(list(tensors)))


def _frozen_sharded(scenario: Scenario, frozen: list[Tensor]) -> int:
    size = 4 if scenario.precision == "fp32" else 2
    if scenario.method != "qlora":
        return _sharded(scenario, frozen, size)
    whole = 0
    for tensor in frozen:
        if not tensor.is_4bit:
            whole += _sharded(scenario, [tensor], size)
            continue
        shard = math.ceil(stored_elements(scenario, tensor) / scenario.num_devices) * size
        whole += tensor.count * (shard + constants_bytes(scenario, tensor))
    return whole


def whole_small_tensors(scenario: Scenario) -> int:
    """Return the bytes of small tensors, which ZeRO-3 keeps whole on every rank beside its part of them.

    They are gathered from equal parts, so that the padding of the last part is there too.
    """
    if scenario.zero_stage != 3:
        return 0
    ranks = scenario.num_devices
    whole = [(tensor.count, tensor.numel) for tensor in scenario.trained]
    whole += [(tensor.count, stored_elements(scenario, tensor)) for tensor in scenario.frozen]
    padded = sum(count * math.ceil(n / ranks) * ranks for count, n in whole if n <= scenario.zero.persistent)
    return padded * scenario.weight_bytes


def stored_elements(scenario: Scenario, tensor: Tensor) -> int:
    """Count the elements of the compute type in which a frozen tensor is stored; ZeRO-3 shards 4-bit ones so."""
    if scenario.method == "qlora" and tensor.is_4bit:
        return _packed(tensor.numel) // scenario.weight_bytes
    return tensor.numel


def _second_weights(scenario: Scenario) -> int:
    if scenario.zero_stage != 3 or scenario.hpz <= 1:
        return 0
    tensors = [*scenario.trained, *scenario.frozen]
    return sum(math.ceil(numel / scenario.hpz) for numel in each(tensors)) * scenario.weight_bytes


def _gradients(scenario: Scenario, elements: int) -> int:
    if not scenario.num_trained:
        return 0
    if scenario.offload_optimizer != "none" and scenario.zero_stage in (1, 2):
        return 0  # they go to the host as they come: host_memory.offload_buffer_bytes
    size = scenario.gradient_bytes or (scenario.weight_bytes if scenario.zero_stage is not None else 4)
    if scenario.zero_stage is None and scenario.precision == "bf16" and not scenario.master_bytes:
        size = scenario.gradient_bytes or 2
    if not scenario.zero_stage:
        return scenario.num_trained * size
    # ZeRO-1 keeps whole gradients from one micro-step to the next and shards them only for the step.
    kept = scenario.num_trained if scenario.zero_stage == 1 and scenario.num_micro_steps > 1 else 0
    return (elements + kept) * size
