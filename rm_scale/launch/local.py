"""Start a run here, or on the machines of a hostfile, with DeepSpeed's launcher."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from rm_scale.launch.auto_batch import auto_batch
from rm_scale.launch.deepspeed_command import launch_command, run_command
from rm_scale.launch.machine import find_machine
from rm_scale.launch.planned_run import plan_run, refuse_another_size, refuse_what_does_not_fit


def start_run(options: argparse.Namespace, settings: list[str]) -> int:
    """Plan, check, and start the run; return its exit code.

    Raises:
        ConfigError: settings are wrong, or the plan does not fit and was not forced.
    """
    machine = find_machine(options)
    planned = plan_run(options.tier, settings, machine, check_output=not options.dry_run)
    refuse_another_size(options.tier, planned)
    print(planned.lines())
    refuse_what_does_not_fit(planned, machine, "plan" in options.force)
    settings = planned.settings
    if options.auto_batch:
        settings += auto_batch(settings, planned.parsed, planned.plan, machine)
    command, environment = launch_command(machine, settings)
    print(f"\n{_as_typed(command, environment)}", flush=True)
    if options.dry_run:
        return 0
    return run_command(command, environment).returncode


def _as_typed(command: Sequence[str], environment: dict[str, str]) -> str:
    return shlex.join([*(f"{name}={value}" for name, value in environment.items()), *command])
