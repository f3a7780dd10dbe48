"""Peak memory of a row of published measurements: the planner's parts, in the unit and of the kind that the row names.

Ways to run that the planner doesn't offer are counted here: gradients used up on the way, compiled layers, selective
checkpointing, checkpoints on the host, chunked losses, GPTQ.
"""

from __future__ import annotations

import re
from dataclasses import replace

from rm_scale.planning.estimate import activations, peak_memory, update_bytes
from rm_scale.planning.flops import linear_parameters
from rm_scale.planning.hardware import GIB
from rm_scale.planning.published.scenario_of_row import (
    NotModelled,
    Row,
    is_compiled,
    is_older_transformers,
    is_own_qwen_code,
    techniques,
)
from rm_scale.planning.scenario import Scenario

RESERVED = 1.05
"""Reserved over allocated memory: the allocator hands out rounded blocks and keeps pieces it can't use again."""

RESERVED_SHARDED = 1.10
"""The same where whole weights come and go between activations and leave holes (ZeRO-3, FSDP)."""


LOGIT_BYTES = 14.0
"""Bytes per logit when a language model's loss runs backwards: 2, log-softmax in fp32 4, two gradients 8."""

UPCAST = 6.0
"""Bytes per logit less where the loss stays in the model's 16 bits: log-softmax and two gradients."""

KEPT_LOGITS = 2.0
"""Bytes per logit more where the fp32 copy of logits is what the model returns, so that it stays beside the loss."""


def peak_memory_of_row(row: Row, scenario: Scenario) -> float:
    """Predict peak memory in the row's unit, and of the kind that it reports: allocated, reserved, by nvidia-smi.

    Raises:
        NotModelled: the row's way to run keeps what the planner can't count.
    """
    if row["act_ckpt"].startswith("varies"):
        raise NotModelled(f"activation checkpointing {row['act_ckpt']!r}")
    if "unpacked" in row["notes"]:
        raise NotModelled("real lengths of the padded sequences are not given")
    if not row["mem_unit"] and not row["mem_kind"]:
        raise NotModelled("neither unit nor kind is asked for")
    if scenario.method == "lora" and scenario.zero_stage == 3 and row["source"] == "Lightning-AI/litgpt":
        raise NotModelled("FSDP units that mix frozen and trained weights, which keep gradients of both")
    scenario = replace(scenario, checkpointing=scenario.checkpointing or scenario.selective_checkpointing)
    parts = _with_own_activations(peak_memory(scenario), _activation_bytes(row, scenario))
    if scenario.method == "full":
        parts["gradients"] = _gradients_at_peak(row, scenario, parts)
    allocated = sum(size for name, size in parts.items() if name != "framework")
    held = allocated
    if _reports_reserved(row):
        held = allocated * (RESERVED_SHARDED if scenario.zero_stage == 3 else RESERVED)
        held = max(held, min(held + _stranded(row, scenario, parts), _most_held(scenario)))
    if _is_by_driver(row):
        held += parts["framework"]
    if "SUM" in row["mem_unit"]:
        held *= scenario.num_devices
    return held / _unit(row["mem_unit"])


def _with_own_activations(parts: dict[str, int], num_bytes: float) -> dict[str, float]:
    """Replace the planner's activations by those of the row's own way to run.

    Activations and the optimizer step are never there at once, so that the larger of both counts: beside a step that
    the planner found to be larger, only what the new activations take more is added.

    Args:
        parts: bytes by part, as the planner found them.
        num_bytes: the row's activations.
    """
    in_step = parts.get("optimizer_step", 0)
    return {**parts, "activations": max(0.0, num_bytes - in_step) if in_step else num_bytes}


def _gradients_at_peak(row: Row, scenario: Scenario, parts: dict[str, float]) -> float:
    """Return the bytes of gradients while most is held.

    None where the optimizer uses each one up as soon as it is there. With a single micro-step they grow while
    activations shrink, so that the peak is at one end of the backward pass; else they are there all along.
    """
    if "opt in bwd" in techniques(row) or "in-bwd" in row["optimizer"]:
        return 0.0
    fresh = scenario.num_micro_steps == 1 and scenario.zero_stage is None and scenario.optimizer_bytes > 0
    if not fresh:
        return parts["gradients"]
    passing = activations(scenario).transient_bytes
    return max(0.0, parts["gradients"] + passing - parts["activations"])


def _is_by_driver(row: Row) -> bool:
    """Tell whether the row reports what nvidia-smi shows, context included, as rows do that name no other kind."""
    kind = row["mem_kind"]
    return not kind or "smi" in kind or kind.startswith("not stated")


def _reports_reserved(row: Row) -> bool:
    """Tell whether the row reports what the allocator holds, used or not; of two kinds named the first counts."""
    return _is_by_driver(row) or re.match(r"(peak |max )?reserved", row["mem_kind"]) is not None


def _stranded(row: Row, scenario: Scenario, parts: dict[str, float]) -> float:
    """Return the bytes that the allocator keeps beside those in use: of activations or the update, the smaller.

    They are never in use together, but what one has left is in pieces that the other's larger tensors don't fit, so
    that the allocator asks the driver for more as long as there is some. FSDP's update needs no fp32 copy of gradients.
    """
    if "FSDP" in row["sharding"]:
        return 0.0
    update = float(update_bytes(scenario))
    return _activation_bytes(row, scenario) if parts.get("optimizer_step") else min(update, parts["activations"])


def _most_held(scenario: Scenario) -> float:
    """Return the bytes at which the allocator gives back what it keeps before it asks for more."""
    return scenario.device.memory_bytes - scenario.device.context_bytes


def _unit(name: str) -> float:
    """Return the bytes of the row's unit. What nvidia-smi prints, or a screenshot shows, is GiB."""
    in_gib = "GiB" in name or name.startswith("G as printed") or "screenshot" in name or not name
    return GIB if in_gib else 1e9


def _activation_bytes(row: Row, scenario: Scenario) -> float:
    """Return activations as the row keeps them: in one of the planner's two ways, or one that only such rows use."""
    if scenario.selective_checkpointing:
        return activations(scenario).peak_bytes + _kept(scenario, _selected_sizes(scenario))
    layers = replace(scenario, head="score") if scenario.head_chunks else scenario
    memory = activations(layers)
    stored, peak = float(memory.stored_bytes), float(memory.peak_bytes)
    if is_compiled(row) and not scenario.checkpointing:
        stored = _kept(scenario, _compiled_sizes(scenario))
        logits = scenario.largest_tokens * scenario.shape.vocab_size
        peak = stored + (0.0 if scenario.head_chunks else LOGIT_BYTES * logits)
    if scenario.head_chunks:
        peak = max(peak, stored + _logits_by_chunks(scenario))
    if is_own_qwen_code(row) and scenario.zero_stage is not None:
        without_head = activations(replace(scenario, head="score")).peak_bytes
        peak = max(without_head, peak - UPCAST * scenario.largest_tokens * scenario.shape.vocab_size)
    if is_older_transformers(row):
        peak += KEPT_LOGITS * scenario.largest_tokens * scenario.shape.vocab_size
    if "offload" in row["act_ckpt"]:
        peak -= stored
    if scenario.method == "qlora":
        peak += _kept_by_quantised_layers(scenario)
    return peak


def _kept(scenario: Scenario, sizes: int) -> float:
    """Return the bytes of so many bfloat16 elements per token and layer."""
    return 2.0 * scenario.largest_tokens * scenario.shape.num_layers * sizes


def _selected_sizes(scenario: Scenario) -> int:
    """Count elements per token and layer that torchtitan's selective checkpointing keeps.

    These are attention's output and every second product: queries, values, the first of the MLP, its last.
    """
    shape = scenario.shape
    return 2 * shape.query_size + shape.kv_size + shape.intermediate_size + shape.hidden_size


def _compiled_sizes(scenario: Scenario) -> int:
    """Count elements per token and layer that torch.compile keeps.

    It computes activation functions again, but not norms, which are reductions. Kept are residuals, norms, queries,
    keys, values, attention's output and the MLP's first products.
    """
    shape = scenario.shape
    mlp = (2 if shape.style.gated_mlp else 1) * shape.intermediate_size
    return 4 * shape.hidden_size + 2 * shape.query_size + 2 * shape.kv_size + mlp


def _logits_by_chunks(scenario: Scenario) -> float:
    """Return what torchtune's chunked loss holds: all logits in bfloat16, a chunk in fp32 with its log-softmax."""
    logits = scenario.largest_tokens * scenario.shape.vocab_size
    return 2.0 * logits + 8.0 * logits / (scenario.head_chunks or 1)


def _kept_by_quantised_layers(scenario: Scenario) -> float:
    """Return what 4-bit layers kept for the backward pass: GPTQ's their weights, bitsandbytes' of 2023 their inputs."""
    shape = scenario.shape
    if shape.quantization == "gptq":
        layers = 1 if scenario.checkpointing else shape.num_layers
        return 2.0 * layers * linear_parameters(shape) / shape.num_layers
    if scenario.checkpointing:
        return 0.0
    return _kept(scenario, 2 * shape.hidden_size + shape.intermediate_size)
