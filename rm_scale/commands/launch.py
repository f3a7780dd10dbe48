"""`rm-scale launch`: plan a run, check it, print the exact command, and start it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rm_scale.slurm.job_options import add_job_options

HELP = "plan a run, check it, print the exact command, and start it"
DESCRIPTION = "All other options are settings of rm_scale/train.py, such as --config FILE.yaml."
EXAMPLE = "rm-scale launch --tier 1b --dataset_path pairs.jsonl --output_dir outputs/1b --dry_run"
TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rm-scale launch`."""
    run = parser.add_argument_group("run")
    run.add_argument("--tier", help="1b, 3b, 7b or 13b: its model, unless the settings name one of that size")
    run.add_argument("--dry_run", action="store_true", help="plan, check, print the command, and stop")
    run.add_argument("--force", action="append", default=[], help="plan: start although it doesn't fit")
    run.add_argument("--auto_batch", action="store_true", help="find the largest row by trying, from the plan's on")
    devices = parser.add_argument_group("devices")
    devices.add_argument("--gpus", type=int, help="devices on each node; default: those that are here")
    devices.add_argument("--nodes", type=int, default=1, help="nodes, of a hostfile or of a Slurm job")
    devices.add_argument("--hostfile", metavar="FILE", help="DeepSpeed's: lines of 'HOST slots=N'")
    devices.add_argument("--gpu", help="kind of device; default: what is here")
    devices.add_argument("--hardware", metavar="FILE.yaml", help="figures of your own devices")
    devices.add_argument("--slurm", action="store_true", help="hand it to Slurm: print the sbatch command and submit")
    add_job_options(parser, without=("nodes", "gpus"))


def run(options: argparse.Namespace, settings: list[str]) -> int:
    """Plan, check and start; return the exit code of what was started."""
    if options.slurm:
        from rm_scale.slurm.planned_job import submit_run

        return submit_run(options, with_options(options, settings))
    from rm_scale.launch.local import start_run

    return start_run(options, with_options(options, settings))


def with_options(options: argparse.Namespace, settings: Sequence[str]) -> list[str]:
    """Return the settings together with those of our own options that are a run's too."""
    # A run compares itself with the same figures.
    figures = ["--hardware", str(Path(options.hardware).resolve())] if options.hardware else []
    rules = [rule for rule in options.force if rule != "plan"]  # `--force plan` is ours
    return [*figures, *settings, *(["--force", *rules] if rules else [])]
