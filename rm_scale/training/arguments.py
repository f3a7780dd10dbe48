"""Translate the run's settings into TRL's `RewardConfig`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import RewardConfig

from rm_scale.config import RunConfig
from rm_scale.planning.deepspeed_config import engine_config
from rm_scale.planning.optimizer_choice import optimizer_that_runs
from rm_scale.planning.plan import Plan, warmup_steps

_SAME_NAME = (
    "output_dir",
    "max_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "fp16",
    "disable_dropout",
    "seed",
    "data_seed",
    "dataloader_num_workers",
    "ddp_timeout",
    "report_to",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "eval_on_start",
    "save_strategy",
    "save_steps",
    "save_only_model",
    "save_total_limit",
    "metric_for_best_model",
    "disable_tqdm",
    "trust_remote_code",
    "max_length",
    "use_liger_kernel",
)


def training_arguments(config: RunConfig, plan: Plan) -> RewardConfig:
    """Build TRL's `RewardConfig`. From here on transformers knows about ZeRO-3 and shards weights while loading.

    Args:
        config: what was asked.
        plan: what will run; fills every value that has a default by tier.
    """
    if plan.deepspeed_config is None:
        # An earlier run in this process may have left ZeRO-3 on, and weights would be sharded without an engine.
        unset_hf_deepspeed_config()
    values: dict[str, Any] = {name: getattr(config, name) for name in _SAME_NAME}
    optim, _ = optimizer_that_runs(config, plan.device, plan.deepspeed_config is not None, plan.offload)
    assert plan.total_steps is not None
    return RewardConfig(
        **values,
        optim=optim,
        optim_args=config.optim_args,
        learning_rate=plan.learning_rate,
        num_train_epochs=plan.num_train_epochs,
        # To transformers' loop and to DeepSpeed a step is one batch: the trainer runs its micro-batches itself.
        per_device_train_batch_size=math.ceil(plan.global_batch_size / plan.world_size),
        per_device_eval_batch_size=plan.per_device_eval_batch_size,
        gradient_accumulation_steps=1,
        warmup_steps=warmup_steps(config, plan.total_steps),
        run_name=config.run_name or Path(config.output_dir).name,
        deepspeed=engine_config(plan.deepspeed_config, plan.reduces_once),
        use_cpu=plan.device == "cpu",
        center_rewards_coefficient=config.center_rewards_coefficient,
        activation_checkpointing=config.gradient_checkpointing,
        activation_checkpointing_kwargs=_checkpointing(config, plan),
        # A NaN must be seen, not replaced by the average of earlier losses.
        logging_nan_inf_filter=False,
        logging_first_step=True,
        # Every weight takes part in every step, fillers included, so DDP need not search the graph.
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        push_to_hub=False,
        # greater_is_better follows from the metric: losses are better when smaller, every other metric when larger.
    )


def _checkpointing(config: RunConfig, plan: Plan) -> dict[str, Any] | None:
    if not config.gradient_checkpointing:
        return None
    return {"use_reentrant": plan.use_reentrant, **(config.gradient_checkpointing_kwargs or {})}
