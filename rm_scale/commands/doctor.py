"""`rm-scale doctor`: find what would break a run, before it starts."""

from __future__ import annotations

import argparse

HELP = "find what would break a run here or across an allocation, before it starts"
DESCRIPTION = (
    "Check this machine, its ranks, or the machines of a hostfile or of a Slurm allocation. See docs/doctor.md."
)
EXAMPLE = "rm-scale doctor --nproc 2 --model meta-llama/Llama-3.1-8B --method lora"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `rm-scale doctor`."""
    run = parser.add_argument_group("the run to come")
    run.add_argument("--output_dir", default=".", help="where runs will write (default: here)")
    run.add_argument("--model", help="folder or hub name; its size decides how much disk and memory are needed")
    run.add_argument("--method", choices=["full", "lora", "qlora"], default="full", help="how it will be trained")
    run.add_argument("--lora_r", type=int, default=16, help="LoRA rank")
    run.add_argument("--save_total_limit", type=int, default=1, help="checkpoints that the run keeps")
    run.add_argument("--min_free_gb", type=float, help="free disk space to ask for, instead of what --model needs")
    ranks = parser.add_argument_group("ranks").add_mutually_exclusive_group()
    ranks.add_argument("--nproc", type=int, help="ranks to start on this machine (default: one per GPU, else one)")
    ranks.add_argument("--hostfile", help="DeepSpeed's list of machines to start ranks on, 'NAME slots=N' a line")
    checks = parser.add_argument_group("checks")
    checks.add_argument("--timeout_seconds", type=float, default=60.0, help="most time that one check may take")
    checks.add_argument("--json", action="store_true", help="one JSON object on standard output instead of the table")


def run(options: argparse.Namespace) -> int:
    """Make all checks and print them; return 0 when none fails, else 1."""
    from rm_scale.doctor.examine import run

    return run(options)
