"""What passes between a device and its node's memory or disks in a micro-step, and how long it takes.

Source: DeepSpeed 0.19's partition_parameters.py. With `offload_param` a rank's part of each weight lies on its host.
Before a weight is used, the rank copies its part to the device (from NVMe into the host's memory first) and the ranks
gather the parts there; a single rank's part is the whole weight. So weights are copied as often as they are gathered:
in the forward and in the backward pass. Recomputation adds no pass: a layer's weights stay from their recomputation to
their backward pass, as long as a layer is smaller than `stage3_max_reuse_distance`.

With `offload_optimizer` gradients lie on the host between micro-steps, in the weights' type: they are fetched to the
device, added to there and sent back (stage3.py, partition_grads; stage_1_and_2.py,
async_accumulate_grad_in_cpu_via_gpu).
"""

from __future__ import annotations

from rm_scale.planning.memory import held_gradient_elements, partition_elements
from rm_scale.planning.network import gathered_again, sharded_bytes
from rm_scale.planning.scenario import Scenario

HOST_BANDWIDTH = 100e9
"""Bytes/s of a node's memory, shared by its ranks: what the optimizer there and copies to devices get of it."""

HOST_LINK = 25e9
"""Bytes/s between a device and its node's memory (PCIe 4 x16), from page-locked memory; each device has its own."""

PAGEABLE_SHARE = 0.5
"""Of the link's rate, what copies from memory that is not page-locked reach, since the driver copies it to memory that
is: "more than twice as fast" with page-locked memory (NVIDIA's guide to data transfers in CUDA). Not measured here."""

PAGEABLE_TRAFFIC = 3
"""Times that such a copy moves each byte in the host's memory: read and written by the driver, read by the device."""

NVME_BANDWIDTH = 6e9
"""Bytes/s of a node's NVMe disks, shared by its ranks."""


def copied_weight_bytes(scenario: Scenario) -> float:
    """Return the bytes of offloaded weights that one rank copies to its device in a micro-step; 0 without offload.

    With hpZ the parts of the backward pass are those of the second partition, which DeepSpeed keeps on the host too.
    """
    if scenario.zero_stage != 3 or scenario.offload_param == "none":
        return 0.0
    sharded = sharded_bytes(scenario)
    ranks_of_backward = scenario.hpz if scenario.hpz > 1 else scenario.num_devices
    return sharded / scenario.num_devices + sharded * gathered_again(scenario) / ranks_of_backward


def weight_copy_seconds(scenario: Scenario) -> float:
    """Return the seconds of a micro-step's copies of offloaded weights, with nothing else going on.

    A device's link and the node's memory, which all its ranks read at once, work side by side: the slower counts. A
    processor's memory is the host's, so that only reading from NVMe takes time there.
    """
    copied = copied_weight_bytes(scenario)
    in_node = copied * scenario.devices_per_node
    reading = in_node / NVME_BANDWIDTH if scenario.offload_param == "nvme" else 0.0
    # What is read from NVMe lands in page-locked buffers, whatever the setting.
    locked = scenario.pin_memory or scenario.offload_param == "nvme"
    return reading + _link_seconds(scenario, copied, locked)


def copied_gradient_bytes(scenario: Scenario) -> float:
    """Return the bytes of gradients that a rank copies to and from its host, per micro-step in the step's mean.

    ZeRO-3 sends a rank's part down and fetches it again in every micro-step, the first included. ZeRO-2 does so only
    with several micro-steps, with whole gradients of every tensor that reaches into the rank's part, and fetches
    nothing in the first; ZeRO-1 once per step. The fp32 gradients of the update come on top (`update_seconds`).
    """
    if scenario.offload_optimizer == "none" or not scenario.zero_stage:
        return 0.0
    if scenario.zero_stage == 3:
        return 2.0 * partition_elements(scenario) * scenario.weight_bytes
    steps = scenario.num_micro_steps
    if steps <= 1:
        return 0.0
    copies = 2 if scenario.zero_stage == 1 else 2 * steps - 1
    return held_gradient_elements(scenario) * scenario.weight_bytes * copies / steps


def gradient_copy_seconds(scenario: Scenario) -> float:
    """Return the seconds of a micro-step's copies of gradients; both directions wait for each other."""
    return _link_seconds(scenario, copied_gradient_bytes(scenario), scenario.pin_gradients)


def _link_seconds(scenario: Scenario, copied: float, locked: bool) -> float:
    """Return how long each rank takes for `copied` bytes between its device and its host's memory."""
    if scenario.device.is_cpu:
        return 0.0
    link = HOST_LINK * (1.0 if locked else PAGEABLE_SHARE)
    in_memory = copied * scenario.devices_per_node * (1 if locked else PAGEABLE_TRAFFIC)
    return max(copied / link, in_memory / HOST_BANDWIDTH)
