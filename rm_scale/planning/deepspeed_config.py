"""DeepSpeed configurations: find the one asked for and check it against the run before anything is launched."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from rm_scale.config import RunConfig
from rm_scale.errors import ConfigError
from rm_scale.planning.optimizer_choice import OFFLOADED_OPTIMIZERS
from rm_scale.texts import did_you_mean

# What DeepSpeed 0.19 reads; a test compares the second list with the installed version's.
TOP_LEVEL_KEYS = frozenset(
    [
        "activation_checkpointing",
        "aio",
        "amp",
        "autotuning",
        "bf16",
        "bfloat16",
        "checkpoint",
        "comm_optimizer_groups",
        "comms_logger",
        "communication_data_type",
        "compile",
        "compression_training",
        "csv_monitor",
        "curriculum_learning",
        "data_efficiency",
        "data_types",
        "dataloader_drop_last",
        "deepcompile",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "eigenvalue",
        "elasticity",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "graph_harvesting",
        "hybrid_engine",
        "log_level",
        "memory_breakdown",
        "monitor_config",
        "nebula",
        "optimizer",
        "pipeline",
        "prescale_gradients",
        "progressive_layer_drop",
        "scheduler",
        "seq_parallel_communication_data_type",
        "sequence_parallel_size",
        "sparse_attention",
        "sparse_gradients",
        "steps_per_print",
        "swap_folder",
        "tensor_parallel",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallel_",
        "wandb",
        "wall_clock_breakdown",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    ]
)
ZERO_KEYS = frozenset(
    [
        "allgather_bucket_size",
        "allgather_partitions",
        "allgather_sequential",
        "compute_grad_norm",
        "contiguous_gradients",
        "cpu_offload",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "elastic_checkpoint",
        "enable_sanity_checks",
        "gather_16bit_weights_on_model_save",
        "ignore_unused_parameters",
        "leaf_module",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "max_live_parameters",
        "max_reuse_distance",
        "memory_efficient_linear",
        "model_persistence_threshold",
        "module_granularity_threshold",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "override_module_apply",
        "param_persistence_threshold",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "prefetch_bucket_size",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory",
        "stage",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_all_reduce_for_fetch_params",
        "use_multi_rank_bucket_allreduce",
        "zenflow",
        "zero_hpz_partition_size",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
    ]
)

_STAGE3_NAMES = (
    "allgather_sequential",
    "gather_16bit_weights_on_model_save",
    "max_live_parameters",
    "max_reuse_distance",
    "model_persistence_threshold",
    "module_granularity_threshold",
    "param_persistence_threshold",
    "prefetch_bucket_size",
    "use_all_reduce_for_fetch_params",
)
OTHER_NAMES = {
    **{name: f"stage3_{name}" for name in _STAGE3_NAMES},
    "stage3_gather_fp16_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}
"""Further names that DeepSpeed takes for settings of `zero_optimization`, and the one that everything here reads."""
_OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}
"""Switches of old files, and the block that DeepSpeed makes of each."""
_NUMBERS = (
    "allgather_bucket_size",
    "reduce_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
    "zero_hpz_partition_size",
)
_FILLED_IN = ("reduce_bucket_size", "stage3_param_persistence_threshold", "stage3_prefetch_bucket_size")
"""Numbers for which transformers puts one in place of "auto"."""


def shipped_file(folder: str, name: str) -> Path | None:
    """Find a file of `ds_configs/`, `configs/` or `slurm/`, in the installed wheel or else in the repository."""
    package = Path(__file__).resolve().parent.parent
    for root in (package / "shipped", package.parent):
        path = root / folder / name
        if path.is_file():
            return path
    return None


def find_deepspeed_config(name: str) -> Path:
    """Find the JSON file that `deepspeed: NAME` means: a path, or the name of a shipped configuration.

    Raises:
        ConfigError: neither exists.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_file("ds_configs", name if name.endswith(".json") else f"{name}.json")
    if shipped is not None:
        return shipped
    sample = shipped_file("ds_configs", "zero3.json")
    names = ", ".join(sorted(path.stem for path in sample.parent.glob("*.json"))) if sample else "none found"
    raise ConfigError(
        [f"deepspeed={name!r}: no such file. Fix: give a JSON file or one of the shipped names: {names}."]
    )


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """Read the configuration as a dictionary, each setting under one name: DeepSpeed knows some by several.

    Raises:
        ConfigError: the file is missing, isn't a JSON object, or says two things of one setting.
    """
    path = find_deepspeed_config(name)
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            [f"deepspeed={name!r}: {path} is not valid JSON ({error}). Fix: correct the file."]
        ) from error
    if not isinstance(values, dict):
        raise ConfigError([f"deepspeed={name!r}: {path} must hold one JSON object. Fix: correct the file."])
    problems = _use_one_name(values, f"deepspeed={name!r}")
    if problems:
        raise ConfigError(problems)
    return values


def _use_one_name(values: dict[str, Any], where: str) -> list[str]:
    """Rename in place what has several names, as DeepSpeed reads it; return contradictions.

    transformers fills in "auto" under these names alone, and DeepSpeed fails on any that is left.
    """
    problems = _rename(values, "bfloat16", "bf16", where)
    zero = values.get("zero_optimization")
    if not isinstance(zero, dict):
        return problems
    for name, known in OTHER_NAMES.items():
        problems += _rename(zero, name, known, where)
    for switch, block in _OFFLOADS.items():
        if isinstance(zero.get(switch), bool) and zero.pop(switch):
            zero.setdefault(block, {"device": "cpu"})
    return problems


def _rename(values: dict[str, Any], name: str, known: str, where: str) -> list[str]:
    if name not in values:
        return []
    value = values.pop(name)
    if values.setdefault(known, value) == value:
        return []
    return [f"{where}: {name}={value} and {known}={values[known]} are one setting. Fix: remove one of them."]


def engine_config(values: dict[str, Any] | None, reduces_once: bool) -> dict[str, Any] | None:
    """Return what DeepSpeed is handed: the file's settings, less what would slow it down for nothing.

    Args:
        values: the DeepSpeed file; `None` without DeepSpeed.
        reduces_once: see `rm_scale.planning.plan.Plan`; ZeRO-1 is ZeRO-2 with whole gradients between micro-steps.
    """
    if values is None:
        return None
    values = copy.deepcopy(values)
    # Its own speed counter waits for the GPU before and after each micro-step; the run's meters don't.
    values.setdefault("timers", {}).setdefault("throughput", {"enabled": False})
    if reduces_once:
        values["zero_optimization"]["stage"] = 1
    return values


def zero_stage(values: dict[str, Any]) -> int:
    """Return the ZeRO stage, 0 to 3."""
    return int(values.get("zero_optimization", {}).get("stage", 0))


def offload_device(values: dict[str, Any], what: str = "offload_optimizer") -> str:
    """Tell where optimizer state (or, with `offload_param`, parameters) is kept: none, cpu or nvme."""
    return str((values.get("zero_optimization", {}).get(what) or {}).get("device") or "none")


def check_deepspeed_config(values: dict[str, Any], config: RunConfig, world_size: int) -> list[str]:
    """Return everything in the DeepSpeed file that contradicts the run, one sentence each."""
    where = f"deepspeed={config.deepspeed!r}"
    problems = _check_structure(values, where)
    if problems:
        return problems  # nothing below can be read from a file of another shape
    zero = values.get("zero_optimization", {})
    stage = zero_stage(values)
    if config.use_dora and config.load_in_4bit and stage == 3:
        problems.append(
            f"use_dora=True with load_in_4bit=True and {where} (ZeRO-3): DoRA must read whole 4-bit "
            "weights, which ZeRO-3 "
            "has sharded. Fix: use deepspeed: zero2, or LoRA without DoRA."
        )
    if offload_device(values) != "none" and config.optim not in OFFLOADED_OPTIMIZERS:
        problems.append(
            f"optim={config.optim} with {where}: DeepSpeed silently swaps it for an Adam of its own when optimizer "
            f"state is offloaded. Fix: use optim: adamw_torch ({', '.join(OFFLOADED_OPTIMIZERS[1:])} stay what they "
            "are too)."
        )
    elif offload_device(values) != "none" and config.optim_args is not None:
        problems.append(
            f"optim_args={config.optim_args!r} with {where}: DeepSpeed's own {config.optim}, which runs where "
            "optimizer state is offloaded, takes none. Fix: leave optim_args out."
        )
    if offload_device(values) == "nvme" and config.load_best_model_at_end:
        problems.append(
            f"load_best_model_at_end=True with {where}: state on NVMe is written in DeepSpeed's own form, from which "
            "no weights come back. Fix: offload to the CPU, or leave it out and use the best checkpoint-N as the model."
        )
    if stage not in {0, 1, 2, 3}:
        problems.append(f"{where}: zero_optimization.stage={stage}. The stage is 0, 1, 2 or 3. Fix: correct the file.")
    for block in ("optimizer", "scheduler"):
        if block in values:
            problems.append(
                f"{where}: has a {block!r} block, but optimizer and schedule come from the run's settings. "
                f"Fix: remove the block and set optim, learning_rate, lr_scheduler_type instead."
            )
    problems += _check_batch_values(values, config, where)
    problems += _check_precision(values, config, where)
    if stage == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        problems.append(
            f"{where}: zero_optimization.stage3_gather_16bit_weights_on_model_save is not true; ZeRO-3 "
            "weights would not "
            "be gathered at a save. Fix: set it to true."
        )
    if zero.get("zero_quantized_weights") or zero.get("zero_quantized_gradients"):
        problems.append(
            f"{where}: quantised communication (qwZ, qgZ) fails with bfloat16 parameters. Fix: remove "
            "zero_quantized_weights and zero_quantized_gradients; zero_hpz_partition_size can stay."
        )
    partition = int(zero.get("zero_hpz_partition_size", 1) or 1)
    if world_size % partition:
        problems.append(
            f"{where}: zero_hpz_partition_size={partition} does not divide the {world_size} ranks. "
            "Fix: set it to the GPUs per node."
        )
    problems += _check_nvme(zero, where)
    return problems


def _check_structure(values: dict[str, Any], where: str) -> list[str]:
    """Return unknown keys and values of the wrong kind, which DeepSpeed would ignore or fail on."""
    problems = [_unknown_key(key, TOP_LEVEL_KEYS, where) for key in values if key not in TOP_LEVEL_KEYS]
    zero = values.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return [*problems, f"{where}: zero_optimization={zero!r}: must be a block of settings. Fix: correct the file."]
    problems += [_unknown_key(key, ZERO_KEYS, where) for key in zero if key not in ZERO_KEYS]
    if not isinstance(zero.get("stage", 0), int):
        problems.append(
            f"{where}: zero_optimization.stage={zero['stage']!r}: the stage is 0, 1, 2 or 3. Fix: a number."
        )
    blocks = {name: zero.get(name) or {} for name in ("offload_optimizer", "offload_param")}
    blocks |= {name: values.get(name, {}) for name in ("bf16", "fp16", "timers")}
    for name, block in blocks.items():
        if not isinstance(block, dict):
            problems.append(f"{where}: {name}={block!r}: must be a block of settings. Fix: correct the file.")
    return problems + _check_numbers(zero, where)


def _check_numbers(zero: dict[str, Any], where: str) -> list[str]:
    """Return what should be a number and is none; "auto" is one where transformers fills it in."""
    problems = []
    for name in _NUMBERS:
        value = zero.get(name)
        if value is None or (value == "auto" and name in _FILLED_IN):
            continue
        try:
            float(value)
        except (TypeError, ValueError):
            auto = ', or "auto"' if name in _FILLED_IN else ""
            problems.append(f"{where}: {name}={value!r}: must be a number{auto}. Fix: correct the file.")
    return problems


def _unknown_key(key: str, known: frozenset[str], where: str) -> str:
    hint = did_you_mean(key, known, "remove it, or see DeepSpeed's documentation for its name.")
    return f"{where}: {key}: DeepSpeed has no such key. Fix: {hint}"


def _check_batch_values(values: dict[str, Any], config: RunConfig, where: str) -> list[str]:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return [
        f'{where}: {name}={values[name]}: batch and clipping come from the run\'s settings. Fix: set it to "auto".'
        for name in names
        if values.get(name, "auto") != "auto"
    ]


def _check_precision(values: dict[str, Any], config: RunConfig, where: str) -> list[str]:
    problems = []
    for kind, wanted in (("bf16", config.bf16), ("fp16", config.fp16)):
        enabled = values.get(kind, {}).get("enabled", False)
        if enabled != "auto" and bool(enabled) != wanted and (enabled or kind == "bf16"):
            problems.append(
                f'{where}: {kind}.enabled={enabled} but the run has {kind}={wanted}. Fix: set {kind}.enabled to "auto".'
            )
    return problems


def _check_nvme(zero: dict[str, Any], where: str) -> list[str]:
    problems = []
    for what in ("offload_optimizer", "offload_param"):
        block = zero.get(what) or {}
        path = block.get("nvme_path")
        if block.get("device") == "nvme" and not (path and Path(path).is_dir()):
            problems.append(
                f"{where}: {what}.nvme_path={path!r} is not a folder on this machine. Fix: copy the file, "
                "set nvme_path "
                "to a folder on a local NVMe disk, and give the copy's path."
            )
    return problems
