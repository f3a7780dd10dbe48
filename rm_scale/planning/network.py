"""What ranks send each other in a step, and how long it takes.

Volumes: ZeRO (arXiv 1910.02054) and ZeRO++ (arXiv 2306.10209). A collective over n ranks on k nodes moves (n-1)/n of
its bytes over each device's link and (k-1)/k over each node's network cards; whichever takes longer counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rm_scale.planning.hardware import Device
from rm_scale.planning.memory import frozen_bytes, quantisation_constant_bytes
from rm_scale.planning.parameters import total
from rm_scale.planning.scenario import Scenario

LINK_SHARE = 0.8
"""Of a link's data-sheet rate, what large collectives reach (361 of 450 GB/s on NVLink 4, ml-engineering)."""

NETWORK_SHARE = 0.75
"""Of a node's network cards, what large collectives reach (73 % at 4 GiB, ml-engineering)."""

TCP_SHARE = 0.95
"""The same for gloo over TCP between processors: what Ethernet's and TCP's headers leave."""

NODE_LATENCY_SECONDS = 250e-6
"""Start of a collective across nodes; with NETWORK_SHARE it gives the measured 44 % at 256 MiB and 13 % at 16 MiB."""

LINK_LATENCY_SECONDS = 20e-6
"""Start of a collective within a node."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that go through collectives, each counted once as the size of the whole tensor.

    Attributes:
        gather: all-gathers of weights per micro-step, over all ranks.
        gather_in_node: all-gathers of weights per micro-step that stay within a node (hpZ's backward pass).
        reduce: reduce-scatters of gradients per micro-step.
        step_gather: all-gather of updated weights per optimizer step.
        step_reduce: reduction of gradients per optimizer step; an all-reduce counts twice.
        num_calls: collectives per micro-step.
        num_step_calls: collectives per optimizer step.
    """

    gather: float
    gather_in_node: float
    reduce: float
    step_gather: float
    step_reduce: float
    num_calls: float
    num_step_calls: float


def traffic(scenario: Scenario) -> Traffic:
    """Return what one step of this scenario sends."""
    if scenario.num_devices == 1:
        return Traffic(0, 0, 0, 0, 0, 0, 0)
    trained = scenario.num_trained * scenario.weight_bytes
    zero = scenario.zero
    if scenario.zero_stage != 3:
        # ZeRO-2 reduces in every micro-step; ZeRO-1 and DDP in the last one only.
        buckets = math.ceil(scenario.num_trained / zero.reduce)
        if scenario.zero_stage == 2:
            return Traffic(0, 0, trained, trained, 0, buckets, 2)
        if scenario.zero_stage == 1:
            return Traffic(0, 0, 0, trained, trained, 0, buckets + 2)
        gradients = scenario.num_trained * (4 if scenario.method != "full" else scenario.weight_bytes)
        return Traffic(0, 0, 0, 0, 2 * gradients, 0, math.ceil(gradients / 25e6))
    gathered = sharded_bytes(scenario)
    again = gathered * gathered_again(scenario)
    backward_in_node = scenario.hpz > 1 and scenario.num_nodes > 1
    # Weights are fetched ahead in buckets; a tensor larger than the bucket is fetched alone.
    calls = math.ceil((gathered + again) / scenario.weight_bytes / zero.prefetch) + math.ceil(
        scenario.num_trained / zero.reduce
    )
    return Traffic(
        gather=gathered if backward_in_node else gathered + again,
        gather_in_node=again if backward_in_node else 0,
        reduce=trained,
        step_gather=0,
        step_reduce=0,
        num_calls=calls,
        num_step_calls=2,
    )


def gathered_again(scenario: Scenario) -> float:
    """Return the share of the weights that the backward pass gathers once more.

    DeepSpeed keeps a weight when its next use is at most `reuse` elements away. On the way to the last layer and back
    every weight behind it is met twice, three times where layers are recomputed: so many of the last elements stay.
    """
    elements = total([*scenario.trained, *scenario.frozen])
    kept = scenario.zero.reuse / (3 if scenario.checkpointing else 2)
    return max(0.0, 1 - kept / max(1, elements))


def sharded_bytes(scenario: Scenario) -> float:
    """Return the bytes of all sharded weights: what one all-gather of the model moves."""
    trained = total([t for t in scenario.trained if t.numel > scenario.zero.persistent]) * scenario.weight_bytes
    if scenario.method == "full":
        return trained
    return trained + frozen_bytes(scenario) - quantisation_constant_bytes(scenario)


def network_share(device: Device) -> float:
    """Return the share of a node's network cards' rate that collectives reach."""
    return TCP_SHARE if device.is_cpu else NETWORK_SHARE


def seconds_for(scenario: Scenario, num_bytes: float, num_calls: float, within_node: bool = False) -> float:
    """Return the seconds of collectives that move `num_bytes` in `num_calls` calls."""
    if num_bytes == 0 or scenario.num_devices == 1:
        return 0.0
    per_node = scenario.devices_per_node
    nodes = 1 if within_node else scenario.num_nodes
    ranks = per_node * nodes
    link = scenario.device.link_bandwidth * LINK_SHARE
    on_links = num_bytes * (ranks - 1) / ranks / link if per_node > 1 and not scenario.device.is_cpu else 0.0
    network = scenario.device.node_bandwidth * network_share(scenario.device)
    on_network = num_bytes * (nodes - 1) / nodes / network
    usual = NODE_LATENCY_SECONDS if nodes > 1 else LINK_LATENCY_SECONDS
    latency = max(scenario.device.collective_seconds, usual)
    return max(on_links, on_network) + num_calls * latency


def micro_step_seconds(scenario: Scenario) -> float:
    """Return the seconds of a micro-step's collectives with nothing else going on."""
    sent = traffic(scenario)
    whole = seconds_for(scenario, sent.gather + sent.reduce * _reduce_cost(scenario), sent.num_calls)
    return whole + seconds_for(scenario, sent.gather_in_node, 0, within_node=True)


def processor_seconds(scenario: Scenario) -> float:
    """Return the seconds that a micro-step's transfers take from the cores that compute, on a processor.

    Copies, sums and TCP run on those cores, so that computing can't hide them. The link's rate that `rm-scale bench
    hardware` measures between processors is the rate of this work, not that of a wire. GPUs have none of it.
    """
    if not scenario.device.is_cpu:
        return 0.0
    sent, ranks = traffic(scenario), scenario.num_devices
    moved = sent.gather + sent.gather_in_node + sent.reduce * _reduce_cost(scenario)
    return moved * (ranks - 1) / ranks / scenario.device.link_bandwidth


def step_seconds(scenario: Scenario) -> float:
    """Return the seconds of the collectives that happen once per optimizer step."""
    sent = traffic(scenario)
    moved = sent.step_gather + sent.step_reduce * _reduce_cost(scenario)
    return seconds_for(scenario, moved, sent.num_step_calls)


def _reduce_cost(scenario: Scenario) -> float:
    """Return the bytes moved per byte reduced: gloo has no reduce-scatter, and its all-reduce moves twice as much."""
    return 2.0 if scenario.device.is_cpu else 1.0
