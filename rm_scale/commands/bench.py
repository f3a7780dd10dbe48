"""`rm-scale bench hardware`: measure the machine at hand, for the planner."""

from __future__ import annotations

import argparse
from pathlib import Path

from rm_scale.errors import UserError

HELP = "measure the rates of the machine at hand, as a file for --hardware"
DESCRIPTION = "Measure matrix products, memory and links on all ranks at once. See docs/planning.md."
EXAMPLE = "rm-scale bench hardware --output hardware.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `hardware` and its options."""
    commands = parser.add_subparsers(required=True, metavar="WHAT")
    hardware = commands.add_parser("hardware", help="rates of the machine at hand, as a file for --hardware")
    hardware.set_defaults(run=run)
    hardware.add_argument("--output", default="hardware.yaml", help="YAML file to write (default: hardware.yaml)")
    hardware.add_argument("--name", help="what to call the device (default: by its kind and this machine's name)")
    hardware.add_argument("--nproc", type=int, help="ranks that measure at once (default: one per GPU, or two)")
    hardware.add_argument("--seconds", type=float, default=20.0, help="time to measure for, starting left out")


def run(options: argparse.Namespace) -> int:
    """Measure, print a table and write the file; return 0.

    Raises:
        UserError: an option makes no sense, the file can't be written, or the ranks failed.
    """
    from rm_scale.hardware_bench.device_file import check_output, device_name, write_device
    from rm_scale.hardware_bench.measure import measure
    from rm_scale.hardware_bench.table import as_table
    from rm_scale.launch.ranks import num_local_ranks

    if not 1 <= options.seconds <= 3600:
        raise UserError(f"seconds={options.seconds:g}: must be from 1 to 3600. Fix: leave it out, or 20.")
    output = Path(options.output)
    check_output(output)
    num_ranks = num_local_ranks(options.nproc, default_on_cpu=2)
    measured = measure(num_ranks, options.seconds)
    name = device_name(measured, options.name)
    write_device(output, name, measured)
    print(as_table(name, measured))
    print(f"\nwritten to {output}. Plan with it: rm-scale plan ... --gpu {name} --hardware {output}")
    return 0
