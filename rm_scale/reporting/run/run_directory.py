"""The `run/` folder: what was asked, what was planned, and on what it ran."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from rm_scale.config import LAUNCH_FIELDS, RunConfig
from rm_scale.files import write_whole
from rm_scale.json_values import as_mapping, as_number, parse_json
from rm_scale.logs import get_logger
from rm_scale.output_paths import remove_part, removed_with_a_run
from rm_scale.planning.plan import Plan
from rm_scale.version import PACKAGE, __version__

logger = get_logger(__name__)

_CODE = ("rm_scale", "ds_configs", "benchmarks/*.py")
_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "deepspeed",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
    "numpy",
)


def run_folder(config: RunConfig) -> Path:
    """Return the folder of a run's records."""
    return Path(config.output_dir) / "run"


def remove_earlier_run(config: RunConfig) -> None:
    """Take away what a run that `--force overwrite` replaces has written.

    Otherwise its metrics would stand before the new ones, its checkpoints could be resumed from by mistake, and a
    model's files beside an adapter's would be loaded together.
    """
    folder = Path(config.output_dir)
    if not (run_folder(config) / "run_config.yaml").is_file():
        return  # whatever lies there, no run of ours wrote it
    parts = [path for path in folder.iterdir() if removed_with_a_run(path.name)]
    for path in sorted(parts, key=lambda path: (path.name == "run", path)):  # it shows that a run of ours was here
        logger.warning(f"removing {path} of the run that is overwritten")
        left = remove_part(path)
        if left:
            logger.warning(f"{path / left[0]} was not written by that run and stays")


def forget_later_metrics(config: RunConfig, step: int) -> None:
    """Cut records by step back to the checkpoint that a run resumes from; the later steps will be run again.

    A line that a killed attempt left half-written goes too. The file is replaced whole: this attempt may be killed as
    well.
    """
    for path in (run_folder(config) / "metrics.jsonl", run_folder(config) / "steps.jsonl"):
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            write_whole(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    try:
        step = as_number(as_mapping(parse_json(line)).get("step"))
    except ValueError:
        step = None
    return float("inf") if step is None else step


def write_run_records(config: RunConfig, plan: Plan) -> Path:
    """Write `run_config.yaml`, `plan.json` and `environment.json`; return the folder."""
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    asked = config.model_dump(exclude=set(LAUNCH_FIELDS))
    write_whole(folder / "run_config.yaml", yaml.safe_dump(asked, sort_keys=False))
    write_whole(folder / "plan.json", plan.to_json())
    here = {"working_directory": str(Path.cwd())}  # what relative names in run_config.yaml belong to
    write_whole(folder / "environment.json", json.dumps({**environment(), **here}, indent=2))
    return folder


def environment() -> dict[str, Any]:
    """Return versions and hardware of this machine. Environment variables are left out: they may hold tokens."""
    import torch

    changes = _git("status", "--porcelain", "--", *_CODE)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "rm_scale": __version__,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "cpu": _cpu_name(),
        "num_cpus": os.cpu_count(),
        "platform": platform.platform(),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Return what git says of the checkout this package runs from; `None` for an installed one, or without git."""
    root = PACKAGE.parent
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
