"""`rm-scale launch --slurm`: plan here, then hand exactly that to Slurm."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rm_scale.errors import ConfigError
from rm_scale.launch.machine import Machine, device_here, local_gpu_names
from rm_scale.launch.planned_run import nearest_tier, plan_run, refuse_another_size, refuse_what_does_not_fit
from rm_scale.planning.hardware import Device, find_device
from rm_scale.slurm.job_options import sbatch_options, sbatch_options_among
from rm_scale.slurm.site import script_of_tier, site_variables
from rm_scale.slurm.submit import fitted, send
from rm_scale.tiers import model_tier

GPUS_PER_NODE = 8
"""What the job scripts ask for."""


def submit_run(options: argparse.Namespace, settings: Sequence[str]) -> int:
    """Plan, check, print the sbatch command, and submit it unless `--dry_run`.

    Raises:
        UserError: settings or options are wrong, the plan doesn't fit, or Slurm refused the job.
    """
    for name in ("hostfile", "auto_batch"):
        if getattr(options, name):
            raise ConfigError([f"{name} with slurm: Slurm names the machines and starts the run. Fix: leave it out."])
    job = sbatch_options(options, without=("nodes", "gpus"))
    misplaced = sbatch_options_among(settings, after_script=False)
    if misplaced:
        raise ConfigError(misplaced)
    machine, variables = find_machine(options)
    planned = plan_run(options.tier, settings, machine, check_output=False)
    refuse_another_size(options.tier, planned)
    print(planned.lines())
    refuse_what_does_not_fit(planned, machine, "plan" in options.force)
    job = {"nodes": str(machine.nodes), **_gpus(machine), **job}
    if "plan" in options.force:
        variables["RM_SCALE_FORCE"] = "plan"
    # The script's own configuration must not come on top of what was planned here.
    variables["RM_SCALE_CONFIG"] = "none"
    script = script_of_tier(options.tier or nearest_tier(planned.plan.num_parameters))
    tier = model_tier(options.tier).name if options.tier else None
    if "job-name" not in job:
        job["job-name"] = f"rm_{tier}" if tier else "rm"
    submission = fitted(script, job, variables, absolute_config(planned.settings), site_variables())
    print()
    return send(submission, dry_run=options.dry_run)


def find_machine(options: argparse.Namespace) -> tuple[Machine, dict[str, str]]:
    """Return the machines that the job will run on, and the variables that tell the job's script of them.

    Raises:
        ConfigError: the kind of device is not known, or a count makes no sense.
    """
    site = site_variables()
    if options.nodes < 1 or (options.gpus is not None and options.gpus < 1):
        raise ConfigError([f"gpus={options.gpus}, nodes={options.nodes}: both must be at least 1. Fix: correct them."])
    device = _device(options, site)
    asked = site.get("RM_SCALE_RANKS_PER_NODE", "")
    per_node = options.gpus or (int(asked) if asked.isdigit() else 0) or (1 if device.is_cpu else GPUS_PER_NODE)
    variables = {"RM_SCALE_GPU": device.name} if not device.is_cpu else {"RM_SCALE_DEVICE": "cpu"}
    # Where Slurm isn't asked for GPUs it gives whole nodes, and the job can't know how many were planned for.
    if device.is_cpu or asked or site.get("RM_SCALE_GPU_REQUEST") == "none":
        variables["RM_SCALE_RANKS_PER_NODE"] = str(per_node)
    return Machine(device, per_node, options.nodes, None), variables


def _device(options: argparse.Namespace, site: dict[str, str]) -> Device:
    named = options.gpu or site.get("RM_SCALE_GPU", "")
    if not named and site.get("RM_SCALE_DEVICE") == "cpu":
        named = "cpu"
    if named:
        return find_device(named, options.hardware)
    names = local_gpu_names()
    if not names:
        raise ConfigError(
            ["gpu: this machine has none to plan for. Fix: --gpu h100-80g, say, or RM_SCALE_GPU in slurm/site.env."]
        )
    return device_here(names, options.hardware)


def _gpus(machine: Machine) -> dict[str, str]:
    return {} if machine.device.is_cpu else {"gpus-per-node": str(machine.per_node)}


def absolute_config(settings: Sequence[str]) -> list[str]:
    """Return the settings with the configuration file's absolute path: the job may start in another folder."""
    arguments = list(settings)
    for place, word in enumerate(arguments[:-1]):
        if word == "--config":
            arguments[place + 1] = str(Path(arguments[place + 1]).resolve())
    return arguments
