"""`Plan`: what will run, computed from what was asked. Every default that was filled in is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import yaml

from rm_scale.config import LAUNCH_FIELDS, RunConfig
from rm_scale.config_parsing import ParsedConfig
from rm_scale.config_schedules import rate_problems
from rm_scale.errors import ConfigError, collect_problems
from rm_scale.planning.deepspeed_config import check_deepspeed_config, offload_device, read_deepspeed_config, zero_stage
from rm_scale.planning.expert_settings import adapted_parameters, expert_notes
from rm_scale.planning.hardware import read_devices
from rm_scale.planning.layout_choice import choose_packing, default_max_tokens, packing_problems, rope_problems
from rm_scale.planning.model_file_checks import check_adapted_modules, check_tokens
from rm_scale.planning.optimizer_choice import optimizer_that_runs
from rm_scale.planning.package_checks import check_packages
from rm_scale.planning.parameters import count_parameters
from rm_scale.planning.plan_checks import (
    check_batch,
    check_files,
    check_kernels,
    check_model,
    check_output_dir,
)
from rm_scale.planning.shape import ModelShape, read_model_config, shape_from_config
from rm_scale.texts import large_number
from rm_scale.tiers import size_tier


@dataclass(frozen=True)
class Plan:
    """What will run. Printable, and written as `plan.json`.

    Attributes:
        method: full, lora or qlora.
        device: cuda or cpu.
        world_size: ranks.
        num_parameters: backbone parameters, from the model's config.
        size_tier: which defaults apply.
        learning_rate, num_train_epochs, per_device_train_batch_size: as asked or by tier.
        per_device_eval_batch_size: groups per evaluation batch and device.
        gradient_accumulation_steps: micro-steps per optimizer step.
        global_batch_size: groups per optimizer step over all ranks.
        dtype: type the weights are loaded in.
        compute_dtype: type of matrix products.
        zero_stage: 0 to 3 (0: no ZeRO).
        offload: none, cpu or nvme.
        deepspeed_config: the DeepSpeed dictionary, `auto` values unfilled; `None` without DeepSpeed.
        use_reentrant: which kind of gradient checkpointing.
        packing: row layout: none, padding_free or prefix_shared.
        packed_attention: backend of packed rows as asked for; auto is decided when the model is loaded.
        max_tokens_per_device: most tokens of a packed row; `None` without packing.
        reduces_once: under ZeRO-2 gradients stay whole until a step's last micro-batch and are reduced then, rather
            than in every micro-step; known once the data has been read.
        num_train_groups, num_eval_groups, steps_per_epoch, total_steps: known once the data has been read.
        notes: what was decided for the user, one sentence each.
    """

    method: str
    device: str
    world_size: int
    num_parameters: int
    size_tier: str
    learning_rate: float
    num_train_epochs: float
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
    dtype: str
    compute_dtype: str
    zero_stage: int
    offload: str
    deepspeed_config: dict[str, Any] | None
    use_reentrant: bool
    packing: str = "none"
    packed_attention: str = "auto"
    max_tokens_per_device: int | None = None
    reduces_once: bool = False
    num_train_groups: int | None = None
    num_eval_groups: int | None = None
    steps_per_epoch: int | None = None
    total_steps: int | None = None
    notes: tuple[str, ...] = ()

    def with_data(
        self, num_train_groups: int, num_eval_groups: int, max_steps: int, epoch_groups: int | None = None
    ) -> Plan:
        """Return the same plan with the number of steps, once the data has been counted.

        Args:
            num_train_groups: groups to train on.
            num_eval_groups: groups to evaluate on.
            max_steps: optimizer steps asked for, or -1.
            epoch_groups: groups of an epoch, where a mixture uses some more often than once or not at all.
        """
        steps_per_epoch = math.ceil((epoch_groups or num_train_groups) / self.global_batch_size)
        total = max_steps if max_steps > 0 else math.ceil(self.num_train_epochs * steps_per_epoch)
        return replace(
            self,
            num_train_groups=num_train_groups,
            num_eval_groups=num_eval_groups,
            steps_per_epoch=steps_per_epoch,
            total_steps=total,
        )

    def _batch(self) -> str:
        if self.packing != "none":
            return (
                f"{self.global_batch_size} groups per step, {self.packing} rows of up to "
                f"{self.max_tokens_per_device:,} tokens on each of {self.world_size} ranks"
            )
        return (
            f"{self.per_device_train_batch_size} groups x {self.gradient_accumulation_steps} micro-steps x "
            f"{self.world_size} ranks = {self.global_batch_size} per step"
        )

    def to_json(self) -> str:
        """Return the plan as indented JSON."""
        return json.dumps(asdict(self), indent=2)

    def summary(self) -> str:
        """Describe the plan in a few lines."""
        zero = f"ZeRO-{self.zero_stage}" if self.deepspeed_config is not None else "no ZeRO"
        lines = [
            f"{self.method} training of {large_number(self.num_parameters)} parameters on {self.world_size} x "
            f"{self.device}, "
            f"{zero}{f', offload to {self.offload}' if self.offload != 'none' else ''}, "
            f"weights {self.dtype}, compute {self.compute_dtype}",
            f"batch: {self._batch()}, learning rate {self.learning_rate:g}",
        ]
        if self.total_steps is not None:
            lines.append(
                f"data: {self.num_train_groups:,} groups to train on, {self.num_eval_groups:,} to evaluate on, "
                f"{self.total_steps:,} optimizer steps ({self.steps_per_epoch:,} per epoch)"
            )
        return "\n".join([*lines, *self.notes])


def dry_run_text(config: RunConfig, plan: Plan, as_json: bool) -> str:
    """Return what `--dry_run` prints: the plan with its notes, then every setting; or both as JSON."""
    if as_json:
        return f"{config.model_dump_json(indent=2)}\n{plan.to_json()}"
    settings = yaml.safe_dump(config.model_dump(exclude=set(LAUNCH_FIELDS)), sort_keys=False)
    return f"{plan.summary()}\n\nall settings (--json: settings and plan for programs):\n\n{settings}".rstrip()


ShapeReader = Callable[[RunConfig, dict[str, Any]], ModelShape]
"""Returns the shape of a run's model; the second is the content of its config.json."""


def _by_formula(config: RunConfig, model: dict[str, Any]) -> ModelShape:
    return shape_from_config(model)


def make_plan(
    parsed: ParsedConfig,
    world_size: int,
    device: str,
    check_output: bool = True,
    defer_output: bool = False,
    shape_of: ShapeReader = _by_formula,
    or_known: bool = False,
) -> Plan:
    """Turn settings into a plan, or say everything that is wrong with them at once.

    Args:
        parsed: the settings, with the problems found while reading them.
        world_size: number of ranks.
        device: "cuda" or "cpu".
        check_output: probe that the output directory can be written. One rank must do it alone: two would see each
            other's traces.
        defer_output: when the output directory is the only problem, leave it to `require_output_dir`, so that the
            ranks which don't probe learn of it.
        shape_of: how the model's shape is read. By default without torch, which refuses kinds of model that the
            formulas don't know; `rm_scale.modeling.model_shape.shape_of_run` asks their class.
        or_known: plan with the shape that comes with rm_scale where the hub gives no config.json; a dry run always may.

    Raises:
        ConfigError: all problems of settings, files, model and DeepSpeed configuration together.
    """
    config = parsed.config
    problems = list(parsed.problems)
    if parsed.is_unreadable:
        raise _met_by_node(problems)
    model = collect_problems(problems, lambda: _read_model(config, or_known)) if config.model_name_or_path else None
    shape = collect_problems(problems, lambda: shape_of(config, model)) if model is not None else None
    values: dict[str, Any] | None = None
    if config.deepspeed is not None:
        values = collect_problems(problems, lambda: read_deepspeed_config(config.deepspeed or ""))
        if values is not None:
            contradictions = check_deepspeed_config(values, config, world_size)
            problems += contradictions
            values = None if contradictions else values
    problems += check_files(config)
    problems += check_kernels(config, values, device)
    problems += check_packages(config, device)
    if config.hardware is not None:
        collect_problems(problems, lambda: read_devices(config.hardware or ""))
    if model is not None:
        problems += check_tokens(config)
        problems += check_adapted_modules(config)
        problems += packing_problems(config, model)
        problems += rope_problems(config, model)
        problems += check_batch(config, world_size, choose_packing(config, model)[0] != "none")
    if shape is not None:
        problems += check_model(config, shape, values)
    if check_output and "output_dir" not in parsed.broken and not (defer_output and not problems):
        problems += check_output_dir(config, parsed.source)
    if problems:
        raise _met_by_node(problems)
    assert shape is not None and model is not None
    plan = _resolve(config, shape, model, values, world_size, device)
    problems = check_schedule(plan, config)
    if problems:
        raise _met_by_node(problems)
    return plan


def _met_by_node(problems: list[str]) -> ConfigError:
    error = ConfigError(problems)
    error.met_by = "node"  # all ranks of a machine look at the same settings and files
    return error


def require_output_dir(config: RunConfig) -> None:
    """Check that the output directory can be written, on one rank alone.

    Raises:
        ConfigError: it can't, or holds something that must not be overwritten.
    """
    problems = check_output_dir(config)
    if problems:
        raise ConfigError(problems)


def _read_model(config: RunConfig, or_known: bool) -> dict[str, Any]:
    return read_model_config(config.model_name_or_path, config.model_revision, or_known or config.dry_run)


def _resolve(
    config: RunConfig,
    shape: ModelShape,
    model: dict[str, Any],
    values: dict[str, Any] | None,
    world_size: int,
    device: str,
) -> Plan:
    tier = size_tier(count_parameters(shape))
    parameters = adapted_parameters(config.lora_target_parameters, shape) if config.use_peft else ()
    # A run that is not dry loads the model, and then says of a vision tower how large it is.
    notes = [note for note in shape.notes if config.dry_run or note != shape.note_on_towers]
    notes += expert_notes(shape, config.method, config.lora_target_modules, parameters)

    def default(name: str, tier_value: float) -> Any:
        given = getattr(config, name)
        if given is not None:
            return given
        notes.append(f"{name} not given: {tier_value:g}, the default by size ({tier.name})")
        return tier_value

    if config.use_peft and config.learning_rate is None:
        notes.append("adapters usually want a learning rate about ten times higher; the ready LoRA runs use 1e-4")
    packing, note = choose_packing(config, model)
    notes += [note] if note is not None else []
    micro = int(default("per_device_train_batch_size", tier.per_device_train_batch_size))
    accumulation = config.gradient_accumulation_steps or 1
    max_tokens = None
    if packing != "none":
        max_tokens = config.max_tokens_per_device or default_max_tokens(config, micro)
    elif config.global_batch_size is not None:
        if config.per_device_train_batch_size is None:
            micro = _largest_divisor(config.global_batch_size // world_size, micro)
        accumulation = config.global_batch_size // (micro * world_size)
    compute = "bfloat16" if config.bf16 else "float16" if config.fp16 else "float32"
    stage = zero_stage(values) if values is not None else 0
    offload = offload_device(values) if values is not None else "none"
    _, note = optimizer_that_runs(config, device, values is not None, offload)
    notes += [note] if note is not None else []
    return Plan(
        method=config.method,
        device=device,
        world_size=world_size,
        num_parameters=count_parameters(shape),
        size_tier=tier.name,
        learning_rate=default("learning_rate", tier.learning_rate),
        num_train_epochs=default("num_train_epochs", tier.num_train_epochs) if config.max_steps <= 0 else 1.0,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=config.per_device_eval_batch_size or micro,
        gradient_accumulation_steps=accumulation,
        global_batch_size=config.global_batch_size or micro * accumulation * world_size,
        dtype=_weight_dtype(config, compute, values is not None),
        compute_dtype=compute,
        zero_stage=stage,
        offload=offload,
        deepspeed_config=values,
        # PEFT under ZeRO-3 recomputes with gathered weights only in the reentrant kind (TRL#2514).
        use_reentrant=config.use_peft and stage == 3,
        packing=packing,
        packed_attention=config.packed_attention,
        max_tokens_per_device=max_tokens,
        notes=tuple(notes),
    )


def _largest_divisor(number: int, at_most: int) -> int:
    return max(d for d in range(1, max(1, at_most) + 1) if number % d == 0)


def _weight_dtype(config: RunConfig, compute: str, uses_deepspeed: bool) -> str:
    """Return the weights' type: float32 for full training without DeepSpeed, which keeps no fp32 master copy."""
    if config.dtype != "auto":
        return config.dtype
    if config.method == "full" and not uses_deepspeed:
        return "float32"
    return compute


def check_schedule(plan: Plan, config: RunConfig) -> list[str]:
    """Check the schedule's arguments against the learning rate and, once they are known, the run's steps.

    Args:
        plan: the plan so far.
        config: what was asked.
    """
    steps = plan.total_steps if plan.total_steps is not None else config.max_steps if config.max_steps > 0 else None
    warmup = warmup_steps(config, steps or 0)
    return rate_problems(config.lr_scheduler_type, config.lr_scheduler_kwargs, plan.learning_rate, steps, warmup)


def warmup_steps(config: RunConfig, total_steps: int) -> int:
    """Return the optimizer steps of the warm-up, of a run with so many steps."""
    return config.warmup_steps if config.warmup_steps is not None else round(config.warmup_ratio * total_steps)


def fit_budget(plan: Plan, config: RunConfig, longest_group: int) -> Plan:
    """Return the plan with a token budget that the longest group fits into, once the data has been read.

    Args:
        plan: the plan so far.
        config: what was asked; a budget given there is not changed.
        longest_group: tokens of the longest training group in a packed row.

    Raises:
        ConfigError: the budget asked for is too small.
    """
    if plan.max_tokens_per_device is None:
        return plan
    multiple = config.pad_to_multiple_of
    budget = plan.max_tokens_per_device // multiple * multiple
    needed = -(-longest_group // multiple) * multiple
    if budget >= needed:
        return replace(plan, max_tokens_per_device=budget)
    if config.max_tokens_per_device is not None:
        rounded = f" (rounded up to pad_to_multiple_of={multiple}: {needed:,})" if needed != longest_group else ""
        raise ConfigError(
            [
                f"max_tokens_per_device={config.max_tokens_per_device}: the longest group has {longest_group:,} tokens "
                f"in a {plan.packing} row{rounded}, and a group is never cut. Fix: --max_tokens_per_device {needed} "
                "or more, or a smaller --max_length."
            ]
        )
    note = f"max_tokens_per_device not given: {needed:,}, the longest group"
    return replace(plan, max_tokens_per_device=needed, notes=(*plan.notes, note))
