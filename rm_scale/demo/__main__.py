"""`make demo`: the whole path on a tiny model and generated preferences, through the real launcher, in minutes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from rm_scale.distributed import has_gpu
from rm_scale.errors import UserError
from rm_scale.files import free_port
from rm_scale.guard import run_guarded
from rm_scale.launch.ranks import device_flags
from rm_scale.logs import get_logger, setup_logging
from rm_scale.planning.deepspeed_config import shipped_file
from rm_scale.version import PACKAGE

logger = get_logger(__name__)

ACCURACY_TARGET = 0.90


def main() -> int:
    """Make model and data, train them under DeepSpeed, check the result and say where everything is."""
    parser = argparse.ArgumentParser(prog="python -m rm_scale.demo.__main__", description=__doc__)
    parser.add_argument("--output_dir", default="outputs/demo")
    options = parser.parse_args()
    setup_logging()
    return run_guarded(lambda: run_demo(Path(options.output_dir)))


def run_demo(output_dir: Path) -> int:
    """Run the demo; return 0 when held-out accuracy reaches the target.

    Raises:
        UserError: the folder holds another run, or the training failed or fell short of the target.
    """
    started = time.perf_counter()
    assets = output_dir / "assets"
    # The demo's own earlier run is replaced, nobody else's.
    found = {path.name for path in output_dir.iterdir()} if output_dir.is_dir() else set()
    if found - {assets.name} and not (assets / "model" / "asset.json").is_file():
        raise UserError(f"output_dir={output_dir}: holds more than an earlier demo. Fix: another folder.")
    make_assets(assets)
    training_started = time.perf_counter()
    command = demo_command(output_dir, assets)
    logger.info(f"running: {' '.join(command)}")
    code = subprocess.run(command, env=_environment(), check=False).returncode
    if code != 0:
        raise UserError(f"the demo's training ended with exit code {code}. Fix: read the message above.")
    finished = time.perf_counter()
    return _summary(output_dir, finished - training_started, finished - started)


def make_assets(folder: Path) -> None:
    """Make the tiny model with its tokenizer, and the preference files for training and evaluation."""
    from rm_scale.demo.assets import make_tiny_model
    from rm_scale.demo.synthetic_preferences import write_synthetic

    write_synthetic(folder, num_train=NUM_TRAIN, num_heldout=NUM_HELDOUT, seed=0)
    make_tiny_model(folder / "model")


NUM_TRAIN = 12_000
NUM_HELDOUT = 1_400


def demo_command(output_dir: Path, assets: Path) -> list[str]:
    """Return the command a user would type, with the paths of this run."""
    config = shipped_file("configs", "demo_cpu.yaml")
    assert config is not None, "the demo's configuration ships with the package"
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *device_flags(_num_ranks(), has_gpu()),
        *("--master_port", str(free_port())),
        str(PACKAGE / "train.py"),
        *("--config", str(config)),
        *("--model_name_or_path", str(assets / "model")),
        *("--dataset_path", str(assets / "train.jsonl")),
        *("--eval_dataset_path", str(assets / "heldout.jsonl")),
        *("--output_dir", str(output_dir), "--force", "overwrite"),
    ]


def _num_ranks() -> int:
    """Return 2 for two processes on a CPU, or the number of GPUs, at most two."""
    import torch

    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2


def _environment() -> dict[str, str]:
    """Return the environment of the training; DeepSpeed's launcher must be told there when there is no GPU."""
    import torch

    return dict(os.environ) if torch.cuda.is_available() else {**os.environ, "DS_ACCELERATOR": "cpu"}


def _summary(output_dir: Path, training_seconds: float, total_seconds: float) -> int:
    evaluation = json.loads((output_dir / "run" / "evaluation.json").read_text(encoding="utf-8"))
    accuracy = evaluation["accuracy"]
    low, high = evaluation["accuracy_ci95"]
    print(
        f"\nheld-out accuracy {accuracy:.4f} (95 % interval {low:.4f} - {high:.4f}, {evaluation['num_pairs']} pairs), "
        f"target {ACCURACY_TARGET:.2f}; training and evaluation took {training_seconds:.0f} s, all "
        f"{total_seconds:.0f} s\n"
        f"  the model           {output_dir}/ (config.json, model.safetensors, tokenizer)\n"
        f"  how it scores       {output_dir}/scoring_contract.json\n"
        f"  model card          {output_dir}/README.md\n"
        f"  accuracy by subset  {output_dir}/run/evaluation.json\n"
        f"  metrics by step     {output_dir}/run/metrics.jsonl\n"
        f"  what was read       {output_dir}/run/data_report.json\n"
        f"  model and data made {output_dir}/assets/"
    )
    if accuracy < ACCURACY_TARGET:
        raise UserError(
            f"held-out accuracy {accuracy:.4f} is below {ACCURACY_TARGET}. Fix: report this with the output."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
