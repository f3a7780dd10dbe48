"""DeepSpeed configurations: find the one asked for and check it against the run before anything is launched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rm_scale.config import RunConfig
from rm_scale.errors import ConfigError


def shipped_file(folder: str, name: str) -> Path | None:
    """A file of `ds_configs/`, `configs/` or `slurm/`: from the wheel when installed, else from the repository."""
    package = Path(__file__).resolve().parent.parent
    for root in (package / "shipped", package.parent):
        path = root / folder / name
        if path.is_file():
            return path
    return None


def find_deepspeed_config(name: str) -> Path:
    """The JSON file that `deepspeed: NAME` means: a path, or the name of a shipped configuration.

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
    """Read the configuration as a dictionary.

    Raises:
        ConfigError: the file is missing or isn't a JSON object.
    """
    path = find_deepspeed_config(name)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            [f"deepspeed={name!r}: {path} is not valid JSON ({error}). Fix: correct the file."]
        ) from error
    if not isinstance(values, dict):
        raise ConfigError([f"deepspeed={name!r}: {path} must hold one JSON object. Fix: correct the file."])
    return values


def zero_stage(values: dict[str, Any]) -> int:
    """The ZeRO stage, 0 to 3."""
    return int(values.get("zero_optimization", {}).get("stage", 0))


def offload_device(values: dict[str, Any], what: str = "offload_optimizer") -> str:
    """Where optimizer state (or, with `offload_param`, parameters) is kept: none, cpu or nvme."""
    return str(values.get("zero_optimization", {}).get(what, {}).get("device", "none"))


def check_deepspeed_config(values: dict[str, Any], config: RunConfig, world_size: int) -> list[str]:
    """Everything in the DeepSpeed file that contradicts the run, one sentence each."""
    problems: list[str] = []
    where = f"deepspeed={config.deepspeed!r}"
    zero = values.get("zero_optimization", {})
    stage = zero_stage(values)
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
        enabled = values.get(kind, {}).get("enabled", "auto" if kind in values else False)
        if enabled != "auto" and bool(enabled) != wanted and (enabled or kind == "bf16"):
            problems.append(
                f'{where}: {kind}.enabled={enabled} but the run has {kind}={wanted}. Fix: set {kind}.enabled to "auto".'
            )
    return problems


def _check_nvme(zero: dict[str, Any], where: str) -> list[str]:
    problems = []
    for what in ("offload_optimizer", "offload_param"):
        block = zero.get(what, {})
        path = block.get("nvme_path")
        if block.get("device") == "nvme" and not (path and Path(path).is_dir()):
            problems.append(
                f"{where}: {what}.nvme_path={path!r} is not a folder on this machine. Fix: copy the file, "
                "set nvme_path "
                "to a folder on a local NVMe disk, and give the copy's path."
            )
    return problems
