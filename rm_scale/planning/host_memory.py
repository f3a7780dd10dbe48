"""What a run on processors holds beside what a GPU would: blocks that the heap keeps, and what is offloaded.

A processor's memory is the host's, so that offloading to "cpu" moves nothing, and ranks of one node share it. Beside
live tensors the process holds what glibc keeps of freed ones: `distributed._keep_freed_memory` lets it, since taking
memory anew costs up to a third of a step. A freed block is used again, but tensors that stay for longer cut it into
pieces, and what needs a larger one takes fresh memory. The two constants here were set on runs of 135M, 1B, 3B, 7B and
13B shapes; `benchmarks/host_memory.py` prints plan beside measurement.
"""

from __future__ import annotations

from rm_scale.planning.memory import held_gradient_elements, partition_elements
from rm_scale.planning.scenario import Scenario

PIECES_SHARE = 0.45
"""Of the activations, what lies in pieces between them, where each layer's are stored."""

BLOCKS_PER_LAYER = 2
"""Largest passing blocks that each layer leaves behind where layers are recomputed: its stored input lies in front of
them, so that no later layer's block of that size fits. One is of the forward pass, one of the recomputation."""


def stays_in_memory(scenario: Scenario, offload: str) -> bool:
    """Tell whether what is offloaded to `offload` (none, cpu or nvme) takes of the device's own memory."""
    return offload == "none" or (offload == "cpu" and scenario.device.is_cpu)


def offload_buffer_bytes(scenario: Scenario) -> int:
    """Return ZeRO-Offload's gradients on the host beside those that ZeRO-3 keeps there anyway.

    In fp32 they last beside the masters (DeepSpeed: initialize_optimizer_states). Below ZeRO-3 the sum over several
    micro-steps lies there too, in the weights' type.
    """
    if not scenario.zero_stage or scenario.offload_optimizer != "cpu":
        return 0
    summed = scenario.zero_stage < 3 and scenario.num_micro_steps > 1
    kept = held_gradient_elements(scenario) * scenario.weight_bytes if summed else 0
    return int(4 * partition_elements(scenario) + kept)


def update_block_bytes(scenario: Scenario) -> int:
    """Return what an engine's optimizer needs at once on a processor, in blocks as large as a rank's partition.

    Per element 2 or 4 bytes of the gradients in one piece, 4 of them in fp32, and 4 for each of Adam's two temporaries
    (torch: sqrt of the second moments, and that over the bias correction). They fit into no piece that activations
    leave, and so come on top. Without an engine they are as small as one matrix; DeepSpeed's CPU Adam has none.
    """
    if not scenario.zero_stage or not scenario.optimizer_bytes or scenario.offload_optimizer != "none":
        return 0
    at_once: float = partition_elements(scenario)
    if scenario.zero_stage == 3:
        at_once = min(at_once, scenario.zero.sub_group)
    temporaries = 8 if scenario.optimizer_bytes > 4 else 4
    return int(at_once * (scenario.weight_bytes + 4 + temporaries))


def held_block_bytes(scenario: Scenario, activations: int, gradients: int) -> int:
    """Return the freed blocks that the heap keeps beside what is in use.

    Args:
        scenario: the run.
        activations: their most bytes, of the largest micro-step.
        gradients: bytes that last from one micro-step to the next. Without an engine a step of a single micro-step
            makes them while activations go, in the pieces that these leave.
    """
    dequantised = largest_dequantised_bytes(scenario)
    if not scenario.checkpointing:
        in_pieces = PIECES_SHARE * activations
        if scenario.zero_stage is None and scenario.num_micro_steps <= 1:
            in_pieces = max(0.0, in_pieces - gradients)
        return int(in_pieces) + BLOCKS_PER_LAYER * scenario.shape.num_layers * dequantised
    block = max(dequantised, widest_output_bytes(scenario))
    return BLOCKS_PER_LAYER * scenario.shape.num_layers * block


def largest_dequantised_bytes(scenario: Scenario) -> int:
    """Return the largest 4-bit weight in the type it is multiplied in; 0 without any."""
    if scenario.method != "qlora":
        return 0
    sizes = [tensor.numel for tensor in scenario.frozen if tensor.is_4bit]
    return max(sizes, default=0) * scenario.product_bytes


def widest_output_bytes(scenario: Scenario) -> int:
    """Return the largest output of a linear layer for the largest micro-step."""
    widths = [tensor.shape[0] for tensor in scenario.backbone if tensor.role == "linear"]
    return int(max(widths, default=0) * scenario.largest_tokens) * scenario.product_bytes
