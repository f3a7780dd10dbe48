"""What a plan checks beside the settings' own rules: batch, kernels, model, files, output directory.

Each check returns its problems, one sentence each with the value, the rule and the fix.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from rm_scale.config import RunConfig
from rm_scale.config_sources import named_paths
from rm_scale.files import files_of_pattern
from rm_scale.output_lock import LOCK_FILE, refuse, running_owner
from rm_scale.output_paths import all_that_is_read, removed_with_a_run, run_output_problem
from rm_scale.planning.deepspeed_config import offload_device, zero_stage
from rm_scale.planning.expert_settings import expert_names, no_router_loss, router_loss_problem, targets_problem
from rm_scale.planning.families import READ_AS_EXPERTS
from rm_scale.planning.shape import ModelShape
from rm_scale.planning.template_checks import template_problems
from rm_scale.texts import nearest_file

_SAVED_DATASET = ("state.json", "dataset_dict.json")
"""One of these is in a folder that datasets' `save_to_disk` wrote."""


def check_batch(config: RunConfig, world_size: int, packed: bool) -> list[str]:
    """Check that a padded global batch can be divided among ranks and micro-batches; packed rows take any number."""
    total = config.global_batch_size
    if total is None or packed:
        return []
    micro = config.per_device_train_batch_size or 1
    if total % (micro * world_size) == 0:
        return []
    return [
        f"global_batch_size={total}: must be a multiple of per_device_train_batch_size x ranks = {micro} x "
        f"{world_size}. "
        f"Fix: use {max(1, round(total / (micro * world_size))) * micro * world_size}."
    ]


def check_kernels(config: RunConfig, values: dict[str, Any] | None, device: str) -> list[str]:
    """Check that the kernels asked for run on this device, with these packages and under this ZeRO stage."""
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


def check_model(config: RunConfig, shape: ModelShape, values: dict[str, Any] | None) -> list[str]:
    """Check what the model's config.json says against the settings and the DeepSpeed file."""
    problems = []
    too_long = length_problem("max_length", config.max_length, shape)
    problems += [too_long] if too_long is not None else []
    if shape.quantization is not None:
        problems.append(
            f"model_name_or_path={config.model_name_or_path!r}: its weights are already quantised "
            f"({shape.quantization}); they can't be sharded or trained here. Fix: {_unquantised(shape.quantization)}."
        )
    experts = expert_names_problem(config.lora_target_modules, shape.model_type)
    problems += [experts] if config.use_peft and experts is not None else []
    problems += expert_settings_problems(config, shape)
    if values is not None and offload_device(values) == "nvme" and zero_stage(values) != 3:
        problems.append(f"deepspeed={config.deepspeed!r}: offload to NVMe needs ZeRO-3. Fix: set the stage to 3.")
    return problems


def expert_settings_problems(config: RunConfig, shape: ModelShape) -> list[str]:
    """Check the settings for experts and their routers, which training checks on the loaded model in the same words."""
    targets, kind = config.lora_target_parameters, shape.model_type
    found = []
    if config.use_peft and targets:
        found.append(targets_problem(targets, expert_names(shape), f"a model of type {kind}"))
    found.append(router_loss_problem(config.router_aux_loss_coef, kind, no_router_loss(shape)))
    return [problem for problem in found if problem is not None]


def _unquantised(method: str) -> str:
    """Say how to come by weights that can be trained; GPT-OSS and DeepSeek-V3 are published in 4 and 8 bits alone."""
    classes = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
    if method not in classes:
        return "give the unquantised model, with load_in_4bit: true for QLoRA"
    return (
        "save a bfloat16 copy once, with transformers' AutoModelForCausalLM.from_pretrained(NAME, dtype='bfloat16', "
        f"quantization_config={classes[method]}(dequantize=True)).save_pretrained(FOLDER), and give that folder with "
        "the tokenizer's files beside it"
    )


def length_problem(name: str, length: int, shape: ModelShape) -> str | None:
    """Say why sequences can't be so long; `None`: the model has as many positions.

    Args:
        name: of the option or setting.
        length: its value, in tokens.
        shape: the model's.
    """
    if shape.max_positions is None or length <= shape.max_positions:
        return None
    return (
        f"{name}={length}: the model has only {shape.max_positions} positions. "
        f"Fix: --{name} {shape.max_positions} or less."
    )


def expert_names_problem(
    targets: Sequence[str] | None, model_type: str, read_as_experts: Collection[str] | None = None
) -> str | None:
    """Say why `lora_target_modules` names what PEFT would read as the experts or the router; `None` if it does not.

    PEFT takes such names, also at the end of dotted ones, for those of older versions of transformers, and adapts the
    tensors of all experts in place of the linear layers of that name: a hundred times the weights that are meant.

    Args:
        targets: the setting.
        model_type: transformers' name of the family.
        read_as_experts: the names that PEFT reads so in this family; default those that are known.
    """
    targets = list(targets or [])
    if read_as_experts is None:
        read_as_experts = READ_AS_EXPERTS.get(model_type, ())
    found = [target for target in targets if target.rpartition(".")[2] in read_as_experts]
    if not found:
        return None
    names = ", ".join(found)
    return (
        f"lora_target_modules={targets}: of {model_type} models PEFT reads {names} as the tensors of all experts or of "
        f"the router, not as linear layers. Fix: leave {names} out, and set lora_target_parameters: "
        "[experts.gate_up_proj, experts.down_proj] to adapt the experts."
    )


def check_files(config: RunConfig) -> list[str]:
    """Check that the data, template and checkpoint that the settings name exist."""
    problems = []
    for name, path in named_paths(config):
        try:
            is_there = Path(path).exists() or bool(files_of_pattern(path))
        except ValueError as error:
            problems.append(f"{name}={path}: {error}")
            continue
        is_listed = not name.endswith("dataset_path")  # in a list of sources a folder stands for its files
        if not is_there:
            hub = f", or hub: {path} for a data set of the hub" if is_listed and path.count("/") == 1 else ""
            problems.append(f"{name}={path}: no such file.{nearest_file(Path(path))} Fix: correct the path{hub}.")
        elif (
            not is_listed and Path(path).is_dir() and not any((Path(path) / file).is_file() for file in _SAVED_DATASET)
        ):
            problems.append(
                f"{name}={path}: is a folder, but not one written by datasets' save_to_disk. Fix: name the files, "
                f"or a pattern such as '{path.rstrip('/')}/*.jsonl'."
            )
    if config.dataset_cache_dir is not None:
        problems += _cache_problems(Path(config.dataset_cache_dir))
    problems += template_problems(config.chat_template_path)
    resume = config.resume_from_checkpoint
    if resume == "last" and not any(Path(config.output_dir).glob("checkpoint-*")):
        problems.append(
            f"resume_from_checkpoint=last: {config.output_dir} holds no checkpoint. "
            "Fix: leave the setting out to start."
        )
    if resume not in {None, "last", "auto"} and not Path(str(resume)).is_dir():
        problems.append(f"resume_from_checkpoint={resume}: no such folder. Fix: a checkpoint-N folder, last or auto.")
    return problems


def _cache_problems(folder: Path) -> list[str]:
    """Return why no encoded data could be put into a folder, which is made where it is missing; leaves no trace."""
    setting = "dataset_cache_dir"
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        return [f"{setting}={folder}: {there} is no folder. Fix: choose a folder you may write to."]
    may_be_read_only = there == folder and any(there.glob("encoded-*"))  # all that a run reads may be in it
    if not os.access(there, os.W_OK | os.X_OK) and not may_be_read_only:
        return [f"{setting}={folder}: {there} can't be written by this user. Fix: choose a folder you may write to."]
    return []


def _would_be_replaced(model: Path, output: Path) -> bool:
    """Tell whether the model is one of the things that a run writes into its output directory."""
    if model == output:
        return True
    if output not in model.parents:
        return False
    return removed_with_a_run(model.relative_to(output).parts[0])


def _read_by_the_run(config: RunConfig, source: str | None) -> Iterator[Path]:
    """Yield files and folders that a run reads, patterns expanded, and its cache, which is there once it begins."""
    for _, pattern in named_paths(config):
        with contextlib.suppress(ValueError):  # told by `check_files`
            yield from map(Path, [pattern] if Path(pattern).exists() else files_of_pattern(pattern))
    named = (config.chat_template_path, config.deepspeed, source, config.model_name_or_path)
    yield from all_that_is_read(name for name in named if name is not None and Path(name).exists())
    if config.dataset_cache_dir is not None:
        yield Path(config.dataset_cache_dir)


def check_output_dir(config: RunConfig, source: str | None = None) -> list[str]:
    """Check that a run may write its output directory; it is tried, without leaving a trace.

    Args:
        config: the settings.
        source: the file that they were read from, if any.
    """
    path = Path(config.output_dir)
    may_hold_files = config.resume_from_checkpoint is not None or "overwrite" in config.force
    owner = running_owner(path)
    if owner is not None:
        return [str(refuse(path, owner))]
    # A killed run that had not written anything leaves its lock.
    if path.is_dir() and any(not file.name.startswith(LOCK_FILE) for file in path.iterdir()) and not may_hold_files:
        return [
            f"output_dir={config.output_dir}: already holds files. Fix: choose another folder, continue with "
            "--resume_from_checkpoint last, or add --force overwrite."
        ]
    model = all_that_is_read([config.model_name_or_path])
    if any(_would_be_replaced(place.resolve(), path.resolve()) for place in model):
        return [
            f"output_dir={config.output_dir}: holds the model that is to be trained from and would overwrite it. "
            "Fix: choose another output_dir."
        ]
    if may_hold_files:
        removes = "overwrite" in config.force and config.resume_from_checkpoint is None
        problem = run_output_problem(path, removes, config.merge_adapter, list(_read_by_the_run(config, source)))
        if problem is not None:
            return [problem]
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
            # Another job of an array may have put its own output into a folder that both found missing.
            with contextlib.suppress(OSError):
                os.rmdir(folder)
    return []
