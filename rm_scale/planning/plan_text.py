"""What `rm-scale plan` prints: a summary, a table that compares ways to train, every formula with its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rm_scale.planning import network
from rm_scale.planning.advise import Choice, Request
from rm_scale.planning.changes import Change, plan_options
from rm_scale.planning.estimate import (
    RESERVE,
    Estimate,
    activations,
    offloaded_parts,
    tokens_to_hide_communication,
)
from rm_scale.planning.expert_settings import expert_notes
from rm_scale.planning.host_link import (
    HOST_BANDWIDTH,
    HOST_LINK,
    NVME_BANDWIDTH,
    copied_gradient_bytes,
    copied_weight_bytes,
)
from rm_scale.planning.host_memory import stays_in_memory
from rm_scale.planning.memory import (
    frozen_bytes,
    model_states,
    offloaded_weight_bytes,
    partition_elements,
    trained_weight_bytes,
)
from rm_scale.planning.parameters import count_parameters, total
from rm_scale.planning.scenario import Scenario
from rm_scale.planning.step_time import ATTENTION_SHARE, compute_parts, micro_step_flops
from rm_scale.texts import duration, large_number

_GB = 1e9
_CLOSE = 0.95
"""Share of the limit above which `--compare` says that it is close: the predictions are off by a few percent."""
_MUCH_HOST_MEMORY = 100e9
"""Bytes of a node's memory from which on a plan's verdict names it; with anything offloaded there it always does."""
_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "masters and optimizer",
    "gathered_weights": "gathered weights",
    "activations": "activations",
    "communication_buffers": "communication buffers",
    "optimizer_step": "optimizer step",
    "offload_buffers": "offload's gradients",
    "held_blocks": "freed blocks kept",
    "framework": "context and libraries",
}


def summary(request: Request, choice: Choice, price: float | None, num_pairs: float | None) -> str:
    """Write the answer to one request: what it fits, takes and costs."""
    estimated = choice.estimate
    lines = [_title(request), _trained_line(estimated.scenario), *notes(request), ""]
    lines.append(f"{_verdict(estimated)}: {choice.describe()}, {_rows(request, choice)}")
    lines += ["", *_memory_lines(estimated), "", *_time_lines(estimated)]
    lines += _cost_lines(estimated, price, num_pairs)
    lines += _network_lines(request, estimated)
    lines += ["", f"lengths: {request.lengths.origin}", _caveat(request)]
    return "\n".join(lines)


def _title(request: Request) -> str:
    nodes = f" on {request.num_nodes} nodes" if request.num_nodes > 1 else ""
    return (
        f"{request.name}, {large_number(count_parameters(request.shape))} parameters, {request.method}, "
        f"{request.num_devices} x {request.device.title}{nodes}  (predicted)"
    )


def _trained_line(scenario: Scenario) -> str:
    trained = scenario.num_trained
    if scenario.method == "full":
        return f"trains all of them, {trained:,} parameters with the head"
    return f"trains {trained:,} parameters, adapters and head: {trained / (trained + scenario.num_frozen):.2%} of all"


def experts_lines(request: Request) -> list[str]:
    """Say of a mixture of experts what a token goes through, what LoRA adapts and what is kept in 4 bits."""
    return expert_notes(request.shape, request.method, request.lora_targets, request.lora_parameters)


def notes(request: Request) -> list[str]:
    """Return what must be said of the figures: of the request, of the model, and of its experts."""
    return [*request.notes, *request.shape.notes, *experts_lines(request)]


def _caveat(request: Request) -> str:
    return f"{request.device.title}: {request.device.sources}. When to distrust this: docs/planning.md"


def _verdict(estimated: Estimate) -> str:
    """Say whether it fits the devices, and what it asks of a node's memory where that is more than most have free."""
    if not estimated.fits:
        return "DOES NOT FIT"
    if not needs_much_host_memory(estimated):
        return "fits"
    return f"fits if each node has {math.ceil(estimated.host_memory_bytes / _GB):,} GB of memory"


def needs_much_host_memory(estimated: Estimate) -> bool:
    """Tell whether fitting depends on a node's memory, which isn't known beside GPUs; a processor's is its own."""
    scenario = estimated.scenario
    offloads = "cpu" in {scenario.offload_optimizer, scenario.offload_param}
    return not scenario.device.is_cpu and (offloads or estimated.host_memory_bytes > _MUCH_HOST_MEMORY)


def _rows(request: Request, choice: Choice) -> str:
    scenario = choice.estimate.scenario
    steps = f"{scenario.num_micro_steps:g} micro-step{'s' if scenario.num_micro_steps != 1 else ''}"
    if choice.micro_batch is not None:
        return f"{choice.micro_batch} padded groups x {steps} = {request.global_batch_size} groups per step"
    return (
        f"{request.packing} rows of up to {choice.max_tokens:,} tokens, {steps} for {request.global_batch_size} "
        "groups per step"
    )


def estimate_lines(estimated: Estimate) -> list[str]:
    """Write what is predicted for a run, in a few lines."""
    elsewhere = offloaded_texts(estimated.scenario)
    parts = ", ".join(
        f"{_PARTS[name]} {size / _GB:.2f}{f' ({elsewhere[name]})' if name in elsewhere else ''}"
        for name, size in estimated.memory.items()
        if size or name in elsewhere
    )
    host = f"; host memory {estimated.host_memory_bytes / _GB:.0f} GB per node"
    return [
        f"predicted on {estimated.scenario.device.title}: peak {estimated.peak_memory_bytes / _GB:.2f} of "
        f"{estimated.limit_bytes / _GB:.1f} GB per device ({parts}); "
        f"loading {estimated.load_peak_memory_bytes / _GB:.2f} GB"
        f"{host if needs_much_host_memory(estimated) else ''}",
        *_time_lines(estimated),
    ]


def _memory_lines(estimated: Estimate) -> list[str]:
    device = estimated.scenario.device
    lines = ["memory per device, GB"]
    elsewhere = offloaded_texts(estimated.scenario)
    for name, size in estimated.memory.items():
        if size or name in elsewhere:
            line = f"  {_PARTS[name]:<24} {size / _GB:8.2f}"
            lines.append(f"{line}   ({elsewhere[name]})" if name in elsewhere else line)
    lines.append(f"  {'peak in training':<24} {estimated.peak_memory_bytes / _GB:8.2f}")
    lines.append(f"  {'peak while loading':<24} {estimated.load_peak_memory_bytes / _GB:8.2f}")
    lines.append(
        f"  {'limit':<24} {estimated.limit_bytes / _GB:8.2f}   {device.memory_bytes / _GB:.1f} less "
        f"{RESERVE:.0%} that the allocator loses"
    )
    lines.append(f"host memory per node {estimated.host_memory_bytes / _GB:.0f} GB")
    if estimated.nvme_bytes:
        lines.append(f"NVMe per node {estimated.nvme_bytes / _GB:.0f} GB")
    return lines


def offloaded_texts(scenario: Scenario) -> dict[str, str]:
    """Say of each part of the memory table how much of it a rank holds on its node instead, and where."""
    places = {"cpu": "in the host's memory", "nvme": "on NVMe"}
    return {
        name: f"{size / _GB:.2f} GB {places[place]}"
        for name, (size, place) in offloaded_parts(scenario).items()
        if size and not stays_in_memory(scenario, place)
    }


def _time_lines(estimated: Estimate) -> list[str]:
    slow, fast = estimated.pairs_per_second
    tokens = estimated.tokens_per_second_per_device
    mfu = estimated.mfu
    return [
        f"step {_range(seconds(estimated.time.low), seconds(estimated.time.high))}, bound by {estimated.time.bound_by}",
        f"  {_range(f'{slow:,.3g}', f'{fast:,.3g}')} pairs/s, "
        f"{_range(f'{tokens[0]:,.0f}', f'{tokens[1]:,.0f}')} tokens/s/device, "
        f"MFU {_range(f'{min(mfu):.0%}', f'{max(mfu):.0%}')}",
    ]


def _cost_lines(estimated: Estimate, price: float | None, num_pairs: float | None) -> list[str]:
    if num_pairs is None:
        return []
    low, high = estimated.hours(num_pairs)
    text = f"  {num_pairs:,.0f} pairs once: {_range(duration(low * 3600), duration(high * 3600))}"
    if price is not None:
        devices = estimated.scenario.num_devices
        cost = [f"{hours * devices * price:,.2f}" for hours in (low, high)]
        text += f", {_range(*cost)} at {price:g} per device hour"
    return [text]


def _network_lines(request: Request, estimated: Estimate) -> list[str]:
    scenario, bound_by = estimated.scenario, estimated.time.bound_by
    if bound_by == "compute":
        return []
    needed = tokens_to_hide_communication(scenario)
    names = {
        "weight copies": "copying weights from the host",
        "gradient copies": "copying gradients to the host and back",
    }
    moving = names.get(bound_by, "communication")
    lines = [f"  {moving} takes longer than computing below {needed:,.0f} tokens per micro-step; what would help:"]
    lines.append(
        f"    longer rows: --max_tokens {2 * int(scenario.largest_tokens)} or more, with a larger global batch"
    )
    if bound_by == "weight copies":
        return [*lines, "    weights on the devices (--offload optimizer or none), where they fit: with more devices"]
    if bound_by == "gradient copies":
        return [*lines, "    the optimizer on the devices (--offload none), where it fits: with more devices"]
    if scenario.zero_stage == 3 and scenario.num_nodes > 1 and scenario.hpz == 1:
        lines.append("    --hpz: the backward pass gathers weights within each node")
    if request.method != "full" and scenario.zero_stage == 3:
        lines.append("    --zero 2 (weights whole on every device), where it fits: only adapters are sent")
    if request.method == "full":
        lines.append("    --method lora: no gradients of the frozen weights are sent")
    return lines


def refusal(request: Request, choice: Choice, changes: Sequence[Change]) -> str:
    """Say why nothing fits, and what would."""
    estimated = choice.estimate
    need = max(estimated.peak_memory_bytes, estimated.load_peak_memory_bytes)
    lines = [f"even so it needs {need / _GB:.1f} of {estimated.limit_bytes / _GB:.1f} GB. What would make it fit:"]
    lines += [
        f"  {plan_options(change):<40} {change.choice.describe()}, "
        f"{change.choice.estimate.peak_memory_bytes / _GB:.1f} GB"
        for change in changes
    ]
    if not changes:
        lines.append("  nothing among shorter sequences, LoRA, QLoRA and more devices: take a larger device")
    return "\n".join(lines)


def comparison(rows: Sequence[tuple[Request, Choice]], num_pairs: float | None) -> str:
    """Write a table with one line per way to train."""
    head = (
        f"{'method':<8}{'way':<46}{'tokens/row':>11}{'peak GB':>9}{'load GB':>9}{'fits':>6}{'pairs/s':>16}{'MFU':>11}"
    )
    if num_pairs is not None:
        head += f"{'time':>24}"
    # Of QLoRA there is most to say; the rest of it is true of the others too.
    said = notes(rows[-1][0])
    lines = [f"{_title(rows[0][0]).replace(f', {rows[0][0].method}', '')}", *said, "", head]
    for request, choice in rows:
        estimated = choice.estimate
        slow, fast = estimated.pairs_per_second
        line = (
            f"{request.method:<8}{choice.describe():<46}{choice.max_tokens:>11,}"
            f"{estimated.peak_memory_bytes / _GB:>9.1f}{estimated.load_peak_memory_bytes / _GB:>9.1f}"
            f"{_fits(estimated):>6}{_range(f'{slow:.3g}', f'{fast:.3g}', ' - '):>16}"
            f"{_range(f'{min(estimated.mfu):.0%}', f'{max(estimated.mfu):.0%}', ' - '):>11}"
        )
        if num_pairs is not None:
            low, high = estimated.hours(num_pairs)
            line += f"{_range(duration(low * 3600), duration(high * 3600), ' - '):>24}"
        lines.append(line)
    if any(_fits(choice.estimate) == "close" for _, choice in rows):
        lines.append(
            f"close: needs more than {_CLOSE:.0%} of the memory; see docs/planning.md for how far off this can be"
        )
    lines.append(f"lengths: {rows[0][0].lengths.origin}")
    return "\n".join(lines)


def _fits(estimated: Estimate) -> str:
    if not estimated.fits:
        return "no"
    need = max(estimated.peak_memory_bytes, estimated.load_peak_memory_bytes)
    return "close" if need > _CLOSE * estimated.limit_bytes else "yes"


def _range(low: str, high: str, between: str = " to ") -> str:
    """Return both ends; one of them when they read the same."""
    return low if low == high else f"{low}{between}{high}"


def seconds(value: float) -> str:
    """Format a duration, in milliseconds below a second."""
    if value < 1:
        return f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if value < 100 else f"{value:.0f} s"


def _compute_parts(scenario: Scenario) -> str:
    return ", ".join(f"{name} {seconds(value)}" for name, value in compute_parts(scenario).items() if value)


def _weight_kinds(scenario: Scenario) -> str:
    """Say how many weights are kept in how many bytes, before they are sharded."""
    quantised = [tensor for tensor in scenario.frozen if scenario.method == "qlora" and tensor.is_4bit]
    kinds = [(scenario.num_trained, "trained", trained_weight_bytes(scenario))]
    kinds.append((scenario.num_frozen - total(quantised), "frozen", 4 if scenario.precision == "fp32" else 2))
    parts = [f"{count:,} {kind} of {size} B each" for count, kind, size in kinds if count]
    if quantised:
        size = frozen_bytes(scenario) - kinds[1][0] * kinds[1][2]
        parts.append(f"{total(quantised):,} frozen in 4 bits, {size:,} B with their constants")
    return ", ".join(parts)


def _offload_explanation(estimated: Estimate) -> list[str]:
    """Say what is offloaded, and how long its copies take."""
    scenario = estimated.scenario
    lines = []
    if scenario.offload_param != "none":
        lines.append(
            f"  of these {offloaded_weight_bytes(scenario):,} B are on the node; each rank copies "
            f"{copied_weight_bytes(scenario):,.0f} B to its device in a micro-step, "
            f"{estimated.time.weight_copies:.4g} s: the link {HOST_LINK:.4g} B/s, the node's memory "
            f"{HOST_BANDWIDTH:.4g} B/s for all ranks, NVMe {NVME_BANDWIDTH:.4g} B/s for all ranks "
            "[DeepSpeed partition_parameters.py]"
        )
    if gradients := copied_gradient_bytes(scenario):
        lines.append(
            f"  gradients lie on the node: each rank copies {gradients:,.0f} B of them there and back in a "
            f"micro-step, {estimated.time.gradient_copies:.4g} s over the same link and memory "
            "[DeepSpeed stage3.py, stage_1_and_2.py]"
        )
    return lines


def explanation(estimated: Estimate) -> str:
    """Write every formula with the numbers that went in, and where it is from."""
    scenario = estimated.scenario
    states, sent, flops = model_states(scenario), network.traffic(scenario), micro_step_flops(scenario)
    trained, frozen, ranks = scenario.num_trained, scenario.num_frozen, scenario.num_devices
    device = scenario.device
    elements = partition_elements(scenario)
    lines = [
        "how each figure comes about",
        f"  parameters: trained {trained:,}, frozen {frozen:,} [counted from config.json, tensor by tensor]",
        f"  weights {states.weights:,} B: {_weight_kinds(scenario)}"
        + (
            f", sharded over {ranks} ranks, tensors up to {scenario.zero.persistent:,} elements whole"
            if scenario.zero_stage == 3 and ranks > 1
            else ", whole"
        )
        + " [DeepSpeed stage3.py, stage_1_and_2.py; bitsandbytes: half a byte and 4 B per 64 weights in 4 bits]",
        *_offload_explanation(estimated),
        f"  gradients {states.gradients:,} B; masters {states.masters:,} B = {scenario.master_bytes} x {elements:,}; "
        f"moments {states.moments:,} B = {scenario.optimizer_bytes:g} x {elements:,} [ZeRO, arXiv 1910.02054]",
        f"  gathered weights {estimated.memory['gathered_weights']:,} B: at most {scenario.zero.live:,.0f} elements "
        "and a layer's experts [stage3_max_live_parameters]",
        f"  buffers {estimated.memory['communication_buffers']:,} B: reduce bucket {scenario.zero.reduce:,.0f} elements"
        f"{' twice (overlap_comm)' if scenario.zero.overlaps else ''} and the largest tensor",
    ]
    lines += [
        f"  activations, {name}: {part.num_bytes:,} B = {part.formula}{'' if part.stored else ' (passing)'}"
        for name, part in sorted(activations(scenario).parts.items(), key=lambda item: -item[1].num_bytes)
    ]
    lines += [
        f"  linear operations {flops.linear:.4g} = 2 x {scenario.load.tokens:,.0f} tokens x weights x passes",
        f"  attention operations {flops.attention:.4g}: causal, sum of squared lengths {scenario.load.squared:,.0f}",
        f"  computing {estimated.time.compute:.4g} s: {_compute_parts(scenario)}; linear operations at "
        f"{device.matmul_flops:.4g} x {device.step_efficiency:g}, attention at that x {ATTENTION_SHARE:g}; "
        f"layers take no less than their launches [{device.sources}]",
        f"  communication {estimated.time.communication:.4g} s per micro-step: gathers {sent.gather:.4g} B, within "
        f"nodes {sent.gather_in_node:.4g} B, reduces {sent.reduce:.4g} B, {sent.num_calls:.0f} calls; links "
        f"{device.link_bandwidth:.4g} B/s x {network.LINK_SHARE}, network {device.node_bandwidth:.4g} B/s x "
        f"{network.network_share(device)} [ZeRO++, arXiv 2306.10209]",
        f"  step {estimated.time.low:.4g} to {estimated.time.high:.4g} s = {scenario.num_micro_steps:g} micro-steps x "
        f"(longer of computing and moving .. sum) + {estimated.time.step_communication:.4g} + update "
        f"{estimated.time.update:.4g}",
        f"  all weights {total(scenario.backbone):,}",
    ]
    return "\n".join(lines)
