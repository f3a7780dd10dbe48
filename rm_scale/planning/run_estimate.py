"""The estimate of a run as it was asked for: what `rm-scale launch` checks and training compares itself with."""

from __future__ import annotations

import math
from typing import Any

from rm_scale.config import RunConfig
from rm_scale.config_schedules import read_optim_args
from rm_scale.planning.expert_settings import adapted_parameters
from rm_scale.planning.group_lengths import LengthMix
from rm_scale.planning.hardware import Device
from rm_scale.planning.plan import Plan
from rm_scale.planning.scenario import Buckets, Scenario, default_buckets
from rm_scale.planning.shape import ModelShape

LONG_STEP = 2.0
"""Memory is planned for a step whose tokens are so many standard deviations above the mean: one step in forty."""


def scenario_of_run(
    config: RunConfig, plan: Plan, shape: ModelShape, device: Device, num_nodes: int, lengths: LengthMix
) -> Scenario:
    """Return the scenario that stands for a run.

    Args:
        config: what was asked.
        plan: what will run.
        shape: the model's.
        device: what it runs on.
        num_nodes: nodes.
        lengths: of the training data.
    """
    share = plan.global_batch_size / plan.world_size
    if plan.max_tokens_per_device is None:
        micro_batch = plan.per_device_train_batch_size
        load = lengths.padded_load(micro_batch)
        largest: float = 2 * micro_batch * min(config.max_length, lengths.longest_sequence)
    else:
        tokens = share * lengths.mean_tokens(plan.packing)
        load = lengths.packed_load(plan.packing, plan.max_tokens_per_device)
        # Micro-steps are as even as they can be, so a row rarely reaches a budget that a step needn't use.
        micro_steps = max(1, math.ceil(tokens / plan.max_tokens_per_device - 1e-9))
        long_step = tokens + LONG_STEP * math.sqrt(share) * lengths.spread_of_tokens(plan.packing)
        largest = min(plan.max_tokens_per_device, max(long_step / micro_steps, lengths.largest_group(plan.packing)))
    micro_steps = max(1, math.ceil(share / load.groups - 1e-9))
    values = plan.deepspeed_config or {}
    zero = values.get("zero_optimization", {})
    engine = plan.deepspeed_config is not None
    return Scenario(
        shape=shape,
        device=device,
        num_devices=plan.world_size,
        num_nodes=num_nodes,
        load=load.times(share / micro_steps / load.groups),
        max_row_tokens=largest,
        num_micro_steps=micro_steps,
        method=config.method,
        lora_rank=config.lora_r,
        lora_targets=tuple(config.lora_target_modules) if config.lora_target_modules else None,
        lora_dropout=config.lora_dropout,
        lora_parameters=adapted_parameters(config.lora_target_parameters, shape) if config.use_peft else (),
        nested_quant=config.use_bnb_nested_quant,
        zero_stage=plan.zero_stage if engine else None,
        offload_optimizer=_device_of(zero, "offload_optimizer"),
        offload_param=_device_of(zero, "offload_param"),
        pin_memory=bool((zero.get("offload_param") or {}).get("pin_memory", True)),
        pin_gradients=bool((zero.get("offload_optimizer") or {}).get("pin_memory", True)),
        hpz=int(zero.get("zero_hpz_partition_size", 1) or 1),
        precision="fp32" if plan.compute_dtype == "float32" else "bf16" if engine else "amp",
        checkpointing=config.gradient_checkpointing,
        packed=plan.max_tokens_per_device is not None,
        attention=_attention(config, device),
        fused=config.use_liger_kernel or config.torch_compile,
        optimizer_bytes=optimizer_bytes(config.optim, config.optim_args or ""),
        buckets=buckets(zero, shape.hidden_size),
    )


def _device_of(zero: dict[str, Any], block: str) -> str:
    return str((zero.get(block) or {}).get("device") or "none")


def _attention(config: RunConfig, device: Device) -> str:
    if config.packed_attention in {"auto", "flex"}:
        return "matmul" if device.is_cpu else "varlen"
    return config.packed_attention


def optimizer_bytes(name: str, arguments: str = "") -> float:
    """Return the bytes of optimizer state per weight.

    Args:
        name: transformers' name of the optimizer.
        arguments: its `optim_args`; a momentum and a centred mean are kept per weight.
    """
    if "8bit" in name:
        return 2.0 if "adam" in name else 1.0
    given = read_optim_args(arguments) if arguments else {}
    more = 4.0 * sum(bool(given.get(argument)) for argument in ("momentum", "centered"))
    if name.startswith("sgd"):
        return more
    if "adafactor" in name:
        return 0.1
    return 4.0 + more if "lion" in name or name in {"rmsprop", "adagrad"} else 8.0


def buckets(zero: dict[str, Any], hidden_size: int) -> Buckets:
    """Return ZeRO's buffers as a DeepSpeed file sets them; `auto` as transformers fills it."""
    defaults = default_buckets(hidden_size)

    def number(name: str, default: float) -> float:
        value = zero.get(name, "auto")
        return default if value == "auto" else float(value)

    return Buckets(
        reduce=number("reduce_bucket_size", defaults.reduce),
        prefetch=number("stage3_prefetch_bucket_size", defaults.prefetch),
        persistent=number("stage3_param_persistence_threshold", defaults.persistent),
        live=number("stage3_max_live_parameters", defaults.live),
        reuse=number("stage3_max_reuse_distance", defaults.reuse),
        sub_group=number("sub_group_size", defaults.sub_group),
        overlaps=bool(zero.get("overlap_comm", False)),
    )
