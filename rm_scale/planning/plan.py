"""`Plan`: what will run, computed from what was asked. Every default that was filled in is named."""

from __future__ import annotations

import glob
import importlib.util
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rm_scale.config import ParsedConfig, RunConfig
from rm_scale.errors import ConfigError, collect_problems
from rm_scale.planning.packing import choose_packing, default_max_tokens, packing_problems, rope_problems
from rm_scale.planning.shape import ModelShape, read_model_config, shape_from_config
from rm_scale.planning.zero import check_deepspeed_config, offload_device, read_deepspeed_config, zero_stage
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
    num_train_groups: int | None = None
    num_eval_groups: int | None = None
    steps_per_epoch: int | None = None
    total_steps: int | None = None
    notes: tuple[str, ...] = ()

    def with_data(self, num_train_groups: int, num_eval_groups: int, max_steps: int) -> Plan:
        """The same plan with the number of steps, once the data has been counted.

        Args:
            num_train_groups: groups to train on.
            num_eval_groups: groups to evaluate on.
            max_steps: optimizer steps asked for, or -1.
        """
        steps_per_epoch = math.ceil(num_train_groups / self.global_batch_size)
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
        """The plan as indented JSON."""
        return json.dumps(asdict(self), indent=2)

    def summary(self) -> str:
        """A few lines for people."""
        zero = f"ZeRO-{self.zero_stage}" if self.deepspeed_config is not None else "no ZeRO"
        lines = [
            f"{self.method} training of {self.num_parameters / 1e6:,.1f}M parameters on {self.world_size} x "
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


def make_plan(
    parsed: ParsedConfig, world_size: int, device: str, check_output: bool = True, defer_output: bool = False
) -> Plan:
    """Turn settings into a plan, or say everything that is wrong with them at once.

    Args:
        parsed: the settings, with the problems found while reading them.
        world_size: number of ranks.
        device: "cuda" or "cpu".
        check_output: probe that the output directory can be written. One rank must do it alone: two would see each
            other's traces.
        defer_output: when the output directory is the only problem, leave it to `require_output_dir`, so that the
            ranks which don't probe hear of it.

    Raises:
        ConfigError: all problems of settings, files, model and DeepSpeed configuration together.
    """
    config = parsed.config
    problems = list(parsed.problems)
    model = collect_problems(problems, lambda: _read_model(config)) if config.model_name_or_path else None
    shape = collect_problems(problems, lambda: shape_from_config(model)) if model is not None else None
    values: dict[str, Any] | None = None
    if config.deepspeed is not None:
        values = collect_problems(problems, lambda: read_deepspeed_config(config.deepspeed or ""))
        if values is not None:
            contradictions = check_deepspeed_config(values, config, world_size)
            problems += contradictions
            values = None if contradictions else values
    problems += _check_files(config)
    problems += _check_kernels(config, values, device)
    if model is not None:
        problems += packing_problems(config, model)
        problems += rope_problems(config, model)
        problems += _check_batch(config, world_size, choose_packing(config, model)[0] != "none")
    if shape is not None:
        problems += _check_model(config, shape, values)
    if check_output and "output_dir" not in parsed.broken and not (defer_output and not problems):
        problems += _check_output_dir(config)
    if problems:
        error = ConfigError(problems)
        error.met_by = "node"  # all ranks of a machine look at the same settings and files
        raise error
    assert shape is not None and model is not None
    return _resolve(config, shape, model, values, world_size, device)


def require_output_dir(config: RunConfig) -> None:
    """Check that the output directory can be written, on one rank alone.

    Raises:
        ConfigError: it can't, or holds something that must not be overwritten.
    """
    problems = _check_output_dir(config)
    if problems:
        raise ConfigError(problems)


def _read_model(config: RunConfig) -> dict[str, Any]:
    return read_model_config(config.model_name_or_path, config.model_revision)


def _resolve(
    config: RunConfig,
    shape: ModelShape,
    model: dict[str, Any],
    values: dict[str, Any] | None,
    world_size: int,
    device: str,
) -> Plan:
    tier = size_tier(shape.num_parameters)
    notes: list[str] = []

    def default(name: str, tier_value: float) -> Any:
        given = getattr(config, name)
        if given is not None:
            return given
        notes.append(f"{name} not given: {tier_value:g}, the default for models of {tier.name}")
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
    return Plan(
        method=config.method,
        device=device,
        world_size=world_size,
        num_parameters=shape.num_parameters,
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
        offload=offload_device(values) if values is not None else "none",
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
    """float32 for full fine-tuning without DeepSpeed, which keeps no fp32 master copy; else the compute type."""
    if config.dtype != "auto":
        return config.dtype
    if config.method == "full" and not uses_deepspeed:
        return "float32"
    return compute


def _check_batch(config: RunConfig, world_size: int, packed: bool) -> list[str]:
    total = config.global_batch_size
    if total is None or packed:  # packed rows take any number of groups
        return []
    micro = config.per_device_train_batch_size or 1
    if total % (micro * world_size) == 0:
        return []
    return [
        f"global_batch_size={total}: must be a multiple of per_device_train_batch_size x ranks = {micro} x "
        f"{world_size}. "
        f"Fix: use {max(1, round(total / (micro * world_size))) * micro * world_size}."
    ]


def _check_kernels(config: RunConfig, values: dict[str, Any] | None, device: str) -> list[str]:
    problems = []
    if config.packed_attention in {"varlen", "flex"} and device == "cpu":
        reason = "has no backward pass on a CPU" if config.packed_attention == "flex" else "needs a CUDA device"
        problems.append(
            f"packed_attention={config.packed_attention} on cpu: {reason}. Fix: leave it out, or use matmul."
        )
    if config.use_liger_kernel and device != "cuda":
        problems.append(
            f"use_liger_kernel=True on {device}: Liger's kernels are written for GPUs. Fix: leave use_liger_kernel out."
        )
    if config.use_liger_kernel and device == "cuda" and importlib.util.find_spec("liger_kernel") is None:
        problems.append(
            "use_liger_kernel=True: the package is missing. Fix: pip install liger-kernel, or leave it out."
        )
    if config.torch_compile and values is not None and zero_stage(values) == 3:
        problems.append(
            f"torch_compile=True with deepspeed={config.deepspeed!r} (ZeRO-3): weights are gathered by hooks inside "
            "the layers, which a compiled layer would pass by. Fix: leave torch_compile out, or use zero2."
        )
    return problems


def _check_model(config: RunConfig, shape: ModelShape, values: dict[str, Any] | None) -> list[str]:
    problems = []
    if shape.max_positions is not None and config.max_length > shape.max_positions:
        problems.append(
            f"max_length={config.max_length}: the model has only {shape.max_positions} positions. "
            f"Fix: --max_length {shape.max_positions} or less."
        )
    if shape.quantization is not None:
        problems.append(
            f"model_name_or_path={config.model_name_or_path!r}: its weights are already quantised "
            f"({shape.quantization}); "
            "they can't be sharded or trained here. Fix: give the unquantised model, with load_in_4bit: true for QLoRA."
        )
    if values is not None and offload_device(values) == "nvme" and zero_stage(values) != 3:
        problems.append(f"deepspeed={config.deepspeed!r}: offload to NVMe needs ZeRO-3. Fix: set the stage to 3.")
    return problems


def _check_files(config: RunConfig) -> list[str]:
    problems = []
    for name in ("dataset_path", "eval_dataset_path"):
        for path in getattr(config, name) or []:
            if not Path(path).exists() and not glob.glob(path, recursive=True):
                problems.append(f"{name}={path}: no such file. Fix: check the path{_nearest_file(Path(path))}.")
    if config.chat_template_path is not None and not Path(config.chat_template_path).is_file():
        problems.append(f"chat_template_path={config.chat_template_path}: no such file. Fix: check the path.")
    resume = config.resume_from_checkpoint
    if resume == "last" and not any(Path(config.output_dir).glob("checkpoint-*")):
        problems.append(
            f"resume_from_checkpoint=last: {config.output_dir} holds no checkpoint. "
            "Fix: leave the setting out to start."
        )
    if resume not in {None, "last", "auto"} and not Path(str(resume)).is_dir():
        problems.append(f"resume_from_checkpoint={resume}: no such folder. Fix: a checkpoint-N folder, last or auto.")
    return problems


def _nearest_file(path: Path) -> str:
    import difflib

    if not path.parent.is_dir():
        return f"; the folder {path.parent} doesn't exist either"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _would_be_replaced(model: Path, output: Path) -> bool:
    """Is the model one of the things a run writes into its output directory?"""
    if model == output:
        return True
    if output not in model.parents:
        return False
    first = model.relative_to(output).parts[0]
    return first in {"merged", "run"} or first.startswith("checkpoint-")


def _check_output_dir(config: RunConfig) -> list[str]:
    """Try to write there, and leave no trace of having tried."""
    path = Path(config.output_dir)
    may_hold_files = config.resume_from_checkpoint is not None or "overwrite" in config.force
    if path.is_dir() and any(path.iterdir()) and not may_hold_files:
        return [
            f"output_dir={config.output_dir}: already holds files. Fix: choose another folder, continue with "
            "--resume_from_checkpoint last, or add --force overwrite."
        ]
    if _would_be_replaced(Path(config.model_name_or_path).resolve(), path.resolve()):
        return [
            f"output_dir={config.output_dir}: holds the model that is to be trained from and would overwrite it. "
            "Fix: choose another output_dir."
        ]
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        return [
            f"output_dir={config.output_dir}: can't be written ({error.strerror or error}). "
            "Fix: choose a folder you may write to."
        ]
    finally:
        for folder in missing:
            if folder.is_dir():
                os.rmdir(folder)
    return []
