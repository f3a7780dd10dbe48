"""Options of `rm-scale launch`, apart from what it does, so that `--help` stays quick."""

from __future__ import annotations

import argparse

from rm_scale.launch.slurm.options import add_job_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `rm-scale launch`."""
    parser.add_argument("--tier", help="1b, 3b, 7b or 13b: its model, unless model_name_or_path is given")
    parser.add_argument("--gpus", type=int, help="devices on each node; default: those that are here")
    parser.add_argument("--nodes", type=int, default=1, help="nodes, of a hostfile or of a Slurm job")
    parser.add_argument("--hostfile", metavar="FILE", help="DeepSpeed's: lines of 'HOST slots=N'")
    parser.add_argument("--gpu", help="kind of device; default: what is here")
    parser.add_argument("--hardware", metavar="FILE.yaml", help="figures of your own devices")
    parser.add_argument("--slurm", action="store_true", help="hand it to Slurm: print the sbatch command and submit")
    parser.add_argument("--dry_run", action="store_true", help="plan, check, print the command, and stop")
    parser.add_argument("--force", action="append", default=[], help="plan: start although it doesn't fit")
    parser.add_argument("--auto_batch", action="store_true", help="find the largest row by trying, from the plan's on")
    add_job_options(parser, without=("nodes", "gpus"))
