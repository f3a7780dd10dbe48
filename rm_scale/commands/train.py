"""`rm-scale train`: one training run in this process, as `python rm_scale/train.py` starts it."""

from __future__ import annotations

import argparse

HELP = "train in this process; `rm-scale launch` and `deepspeed rm_scale/train.py` start several"
DESCRIPTION = "All options are settings of a run: rm-scale train --help lists them."
EXAMPLE = "rm-scale train --config configs/demo_cpu.yaml"
TAKES_SETTINGS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: all options are settings of a run."""


def run(options: argparse.Namespace, settings: list[str]) -> int:
    """Train; return 0, 2 after a message for the user, or 85 when asked to stop."""
    from rm_scale.training.lasting_streams import outlast_full_disks
    from rm_scale.training.preemption import watch_signals

    watch_signals()
    outlast_full_disks()
    from rm_scale.train import main

    return main(settings)
